"""`memorizing-transformers evaluate RUN`: what the memory of a trained model is worth on documents it has not seen."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments
from memorizing_transformers_pytorch.config import ModelConfig
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.prepare import prepare
from memorizing_transformers_pytorch.training.controls import CONTROLS
from memorizing_transformers_pytorch.training.evaluate import evaluate
from memorizing_transformers_pytorch.training.evaluation_report import markdown, plot
from memorizing_transformers_pytorch.training.evaluation_summary import Summary, summarise
from memorizing_transformers_pytorch.training.provenance import provenance
from memorizing_transformers_pytorch.training.report import check_plots_are_possible
from memorizing_transformers_pytorch.training.run import LoadedRun, load_run

DEFAULT_SIZES = (0, 512, 2_048, 8_192)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Loss of a run on held-out documents with memories of several sizes, and with memories that should be of no use.

    Writes evaluation.json, evaluation.md and evaluation.png.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    memory: str | None = None
    """Sizes of the memory in entries, such as 0,512,2048. 0 is off and always there. Unless given: 0, 512, 2048, 8192
    and that of the run."""
    controls: bool = True
    """Also read another document's memory, shuffled values and random keys, at the memory size of the run, or the
    largest if that is not among the sizes."""
    split: Literal["test", "valid"] = "test"
    """Which held-out documents of the run."""
    source: str | None = None
    """Evaluate on all documents of this text instead: a file, a folder, hf:NAME, ... (as --data.source of train)."""
    min_tokens: int = 2
    """Leave out documents with fewer tokens."""
    max_tokens: int | None = None
    """Score only so many tokens of each document, from its beginning."""
    documents: int | None = None
    """Evaluate on so many documents, drawn at random; on all unless given."""
    rows: int = 4
    """Documents that are read side by side."""
    checkpoint: Literal["last", "best"] = "last"
    """Which weights of the run."""
    output: Path | None = None
    """Folder to write to; "evaluation" in the run unless given. What is there is replaced at the end."""
    seed: int = 0
    """Of the documents drawn, of shuffling, random keys and intervals."""
    device: str | None = None
    """Such as cpu or cuda."""


class Texts(NamedTuple):
    """Documents as token ids, their names, and the UTF-8 bytes of each."""

    names: list[str]
    tokens: list[np.ndarray]
    num_bytes: list[int]


def main(arguments: Sequence[str], program: str) -> None:
    """Run `evaluate` with these arguments. Raises ValueError for bad input."""
    evaluate_run(parse_arguments(Evaluate, arguments, program))


def evaluate_run(options: Evaluate) -> Path:
    """Read, report and print; returns the folder with the report. Raises ValueError for what makes no sense."""
    check_plots_are_possible()
    wanted = None if options.memory is None else parse_sizes(options.memory)
    folder = options.output or options.run / "evaluation"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder to write to, got the file {str(folder)!r}")
    run = load_run(options.run, options.checkpoint, options.device)
    texts = read_texts(options, run)
    sizes, controls_at = choose_sizes(wanted, run.config.model, options.controls)
    segment_length = run.config.training.segment_length
    losses = evaluate(
        run.model,
        texts.tokens,
        segment_length=segment_length,
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
    text = markdown(summary, f"Evaluation of {run.folder.name}", _what(options, run))
    facts = {"run": str(run.folder), "step": run.step, "segment_length": segment_length, "options": _plain(options)}
    _write(folder, {**facts, **provenance(run.model.device), **summary.to_dict()}, text, summary, segment_length)
    print(f"{text}\n{folder / 'evaluation.md'}, .json and .png")
    return folder


def parse_sizes(text: str) -> list[int]:
    """ "0,512 2048" -> [0, 512, 2048], sorted, with 0. Raises ValueError for anything else."""
    parts = [part for part in re.split(r"[,\s]+", text) if part]
    if not parts or not all(part.replace("_", "").isdecimal() for part in parts):
        raise ValueError(f"expected memory sizes such as 0,512,2048, got {text!r}")
    return sorted({0, *(int(part) for part in parts)})


def choose_sizes(wanted: Sequence[int] | None, config: ModelConfig, controls: bool) -> tuple[list[int], int | None]:
    """The memory sizes to evaluate, and the one at which to read the controls, if any."""
    own = config.max_knn_memories
    if wanted is None:
        wanted = sorted({*DEFAULT_SIZES, own}) if config.layers_with_memory else [0]
    controls_at = own if own in wanted else max(wanted)
    return list(wanted), controls_at if controls and controls_at > 0 else None


def read_texts(options: Evaluate, run: LoadedRun) -> Texts:
    """The documents to evaluate on. Raises ValueError if there are none."""
    data = run.config.data
    if options.source is not None:
        data = DataConfig(source=options.source, valid=0, test=0, near_duplicates=None, cache=data.cache)
    prepared = prepare(data, run.tokenizer.num_tokens, tokenizer=run.tokenizer)
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
    num_bytes = [int(part.num_bytes[n]) for part, n in found]
    if options.max_tokens is not None:
        cut = [text[: options.max_tokens + 1] for text in tokens]
        num_bytes = [
            whole if len(text) == len(short) else len(run.tokenizer.decode(short.tolist()).encode())
            for text, short, whole in zip(tokens, cut, num_bytes, strict=True)
        ]
    return Texts([part.names[n] for part, n in found], tokens, num_bytes)


def _what(options: Evaluate, run: LoadedRun) -> str:
    """A sentence on the weights and the documents."""
    where = f"all of {options.source}" if options.source is not None else f"the {options.split} split"
    least = f" that have {options.min_tokens:,} tokens or more" if options.min_tokens > 2 else ""
    drawn = f" (at most {options.documents} of them, drawn at random)" if options.documents is not None else ""
    cut = "" if options.max_tokens is None else f" Of each the first {options.max_tokens:,} tokens."
    weights = f"The {options.checkpoint} weights of {run.folder}, of step {run.step:,}"
    segments = f"in segments of {run.config.training.segment_length} tokens"
    return f"{weights}, on the documents of {where}{least}{drawn}, {segments}.{cut}"


def _plain(options: Evaluate) -> dict[str, Any]:
    fields = dataclasses.asdict(options)
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}


def _write(folder: Path, content: dict[str, Any], text: str, summary: Summary, segment_length: int) -> None:
    """Write all files aside, then put them in place."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-") as aside:
        new = Path(aside)
        (new / "evaluation.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        (new / "evaluation.md").write_text(text, encoding="utf-8")
        plot(summary, segment_length, new / "evaluation.png")
        for path in sorted(new.iterdir()):
            os.replace(path, folder / path.name)
