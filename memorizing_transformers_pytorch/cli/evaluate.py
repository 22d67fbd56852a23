"""`memorizing-transformers evaluate MODEL`: what the memory of a model is worth on documents that it has not seen."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memorizing_transformers_pytorch.cli.models import chosen_device, is_of_transformers
from memorizing_transformers_pytorch.cli.options.evaluate import Evaluate
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import text_bytes
from memorizing_transformers_pytorch.data.prepare import prepare
from memorizing_transformers_pytorch.data.tokenizer import Tokenizer
from memorizing_transformers_pytorch.evaluation.controls import CONTROLS
from memorizing_transformers_pytorch.evaluation.evaluate import evaluate
from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.evaluation.report import evaluation_charts, markdown
from memorizing_transformers_pytorch.evaluation.summary import Summary, summarise
from memorizing_transformers_pytorch.model.config import ModelConfig
from memorizing_transformers_pytorch.training.checkpoint import read_state
from memorizing_transformers_pytorch.training.run import SHIPPED, LoadedRun, checkpoint_of, load_run, run_named
from memorizing_transformers_pytorch.training.settings import to_plain
from memorizing_transformers_pytorch.utils.charts import check_plots_are_possible, save_png

DEFAULT_SIZES = (0, 512, 2_048, 8_192)


class Texts(NamedTuple):
    """Documents as token ids, their names, and how many UTF-8 bytes of each are scored.

    fingerprint: of the text that they come from, as a checkpoint keeps it.
    """

    names: list[str]
    tokens: list[np.ndarray]
    num_bytes: list[int]
    fingerprint: str


def main(options: Evaluate) -> None:
    """Run `evaluate`. Raises ValueError for bad input."""
    evaluate_run(options)


def evaluate_run(options: Evaluate) -> Path:
    """Evaluate, print the report and write it; returns its folder. Raises ValueError for bad options."""
    check_plots_are_possible()
    wanted = None if options.memory is None else parse_sizes(options.memory)
    is_hub, name = is_of_transformers(options.run), run_named(options.run)
    folder = options.output or (Path("evaluation") if is_hub or name == SHIPPED else name / "evaluation")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder to write to, got the file {str(folder)!r}")
    if is_hub:
        from memorizing_transformers_pytorch.cli.evaluate_hub import evaluate_hub_model

        with written_to(folder) as aside:
            evaluate_hub_model(options, aside)
        print(f"\n{folder / 'evaluation.md'} and .json")
        return folder
    if options.memories is not None or options.retrieve is not None:
        raise ValueError("--memories and --retrieve are for models of transformers")
    run = load_run(name, options.checkpoint, chosen_device(options.device), options.index)
    sizes, controls_at = choose_sizes(wanted, run.config.model, options.controls)
    with written_to(folder) as aside:
        texts = read_texts(options, run)
        warning = check_text(options, texts.fingerprint)
        losses = evaluate(
            run.model,
            texts.tokens,
            segment_length=run.config.training.segment_length,
            memory_sizes=sizes,
            controls_at=controls_at,
            controls=[name for name in CONTROLS if name != "other" or len(texts.tokens) > 1],
            rows=options.rows,
            max_tokens=options.max_tokens,
            seed=options.seed,
            progress=True,
        )
        summary = summarise(
            losses, names=texts.names, num_bytes=texts.num_bytes, controls_at=controls_at, seed=options.seed
        )
        _report(options, run, summary, warning, aside)
    print(f"\n{folder / 'evaluation.md'}, .json and .png")
    return folder


def check_text(options: Evaluate, fingerprint: str) -> str | None:
    """A warning, also printed to standard error, if the text of the run has changed since training."""
    trained_on = read_state(checkpoint_of(run_named(options.run), options.checkpoint))["text"]
    if options.source is not None or trained_on == fingerprint:
        return None
    warning = "the text has changed since training: documents held out now may have been trained on"
    print(f"warning: {warning}", file=sys.stderr)
    return warning


def parse_sizes(text: str) -> list[int]:
    """ "0,512 2048" -> [0, 512, 2048], sorted, with 0. Raises ValueError for anything else."""
    parts = text.replace(",", " ").split()
    if not parts or not all(part.replace("_", "").isdecimal() for part in parts):
        raise ValueError(f"expected memory sizes such as 0,512,2048, got {text!r}")
    return sorted({0, *map(int, parts)})


def choose_sizes(wanted: Sequence[int] | None, config: ModelConfig, controls: bool) -> tuple[list[int], int | None]:
    """The memory sizes to evaluate, and the size at which to read the controls, if any."""
    own = config.max_knn_memories
    if wanted is None:
        wanted = sorted({*DEFAULT_SIZES, own}) if config.layers_with_memory else [0]
    controls_at = own if own in wanted else max(wanted)
    return list(wanted), controls_at if controls and controls_at > 0 else None


def read_texts(options: Evaluate, run: LoadedRun) -> Texts:
    """The documents to evaluate on. Raises ValueError if there are none."""
    prepared = prepare(data_of(options, run.config.data), run.tokenizer.num_tokens, tokenizer=run.tokenizer)
    every = (prepared.train, prepared.valid, prepared.test)
    parts = every if options.source is not None else (getattr(prepared, options.split),)
    least = max(options.min_tokens, 2)
    found = [(part, n) for part in parts for n in range(len(part)) if len(part[n]) >= least]
    if not found:
        where = options.source or f"the {options.split} split"
        raise ValueError(f"expected documents of at least {least} tokens in {where}, got none")
    if options.documents is not None and options.documents < 1:
        raise ValueError(f"expected documents to be at least 1, got {options.documents}")
    if options.documents is not None and options.documents < len(found):
        drawn = np.random.default_rng(options.seed).choice(len(found), options.documents, replace=False)
        found = [found[n] for n in sorted(drawn)]
    tokens = [part[n] for part, n in found]
    num_bytes = [scored_bytes(part[n], int(part.num_bytes[n]), options.max_tokens, run.tokenizer) for part, n in found]
    return Texts([part.names[n] for part, n in found], tokens, num_bytes, prepared.fingerprint)


def data_of(options: Evaluate, data: DataConfig) -> DataConfig:
    """The text to read, and how: as in the run (data), except for what the options say."""
    data = dataclasses.replace(data, cache=options.cache or data.cache)
    if options.source is None:
        if options.text_column is not None:
            raise ValueError(f"expected text_column only with a source, got {options.text_column!r}")
        return data
    return dataclasses.replace(
        data,
        source=options.source,
        text_column=options.text_column or data.text_column,
        subset=data.subset if options.source == data.source else None,
        streaming=data.streaming and options.source.startswith("hf:"),
        valid=0,
        test=0,
        near_duplicates=None,
    )


def scored_bytes(text: np.ndarray, num_bytes: int, max_tokens: int | None, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the scored tokens of a text of num_bytes: all but the first token, and at most max_tokens.

    A character that several tokens write counts where it ends.
    """

    def read_by(count: int) -> int:
        decoded = tokenizer.decode(text[:count].tolist())
        return len(text_bytes(decoded.removesuffix("\N{REPLACEMENT CHARACTER}")))  # a character that is cut off

    kept = len(text) if max_tokens is None else min(max_tokens + 1, len(text))
    return max((num_bytes if kept == len(text) else read_by(kept)) - read_by(1), 0)


def _what(options: Evaluate, run: LoadedRun) -> str:
    """A sentence on the weights and the documents."""
    where, first = f"the {options.split} split", run.config.data.max_documents
    if options.source is not None:
        where = f"all of {options.source}" if first is None else f"{options.source} (the first {first:,})"
    least = f" that have {options.min_tokens:,} tokens or more" if options.min_tokens > 2 else ""
    drawn = f" (at most {options.documents} of them, drawn at random)" if options.documents is not None else ""
    cut = "" if options.max_tokens is None else f" Of each the first {options.max_tokens:,} tokens."
    weights = f"The {options.checkpoint} weights of {run.folder}, of step {run.step:,}"
    segments = f"in segments of {run.config.training.segment_length} tokens"
    return f"{weights}, on the documents of {where}{least}{drawn}, {segments}.{cut}"


@contextmanager
def written_to(folder: Path) -> Iterator[Path]:
    """A folder inside that folder, made at once, since evaluating may take hours. Its files are moved out at the end.

    Raises ValueError if it cannot be made. If anything fails inside, everything is as it was.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as stack:
        for path in reversed(made):
            stack.callback(_remove_if_empty, path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            aside = stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-"))
        except OSError as error:
            raise ValueError(f"expected a folder to write to, got {str(folder)!r}: {error.strerror}") from None
        yield Path(aside)
        for path in sorted(Path(aside).iterdir()):
            os.replace(path, folder / path.name)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _report(options: Evaluate, run: LoadedRun, summary: Summary, warning: str | None, folder: Path) -> None:
    """Print the report, then write it with the numbers and the plot."""
    found, segment_length = provenance(run.model.device), run.config.training.segment_length
    came_from = f"Checkpoint of step {run.step:,}; evaluated {origin(found)}."
    title = f"Evaluation of {run.folder.name}"
    text = markdown(summary, title, _what(options, run), warning=warning, origin=came_from)
    with suppress(BrokenPipeError):  # the files are written even if nobody reads the output to its end
        print(text)
    facts = {"run": str(run.folder), "step": run.step, "segment_length": segment_length, "warning": warning}
    content = {**facts, "options": to_plain(options), **found, **summary.to_dict()}
    (folder / "evaluation.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (folder / "evaluation.md").write_text(text, encoding="utf-8")
    save_png(evaluation_charts(content), folder / "evaluation.png")
