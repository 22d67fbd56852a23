"""`memorizing-transformers train`: a preset, over it a YAML file, over that flags; then what the run is worth."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments
from memorizing_transformers_pytorch.cli.evaluate import Evaluate, evaluate_run
from memorizing_transformers_pytorch.data.prepare import prepare
from memorizing_transformers_pytorch.explorer import Explanation, explain
from memorizing_transformers_pytorch.explorer.run_page import write_run_page
from memorizing_transformers_pytorch.model.generation import generate
from memorizing_transformers_pytorch.model.session import Session
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.loop import train
from memorizing_transformers_pytorch.training.presets import run_preset
from memorizing_transformers_pytorch.training.run import LoadedRun, config_of, free_name, load_run
from memorizing_transformers_pytorch.training.settings import from_plain, merged, read_yaml, to_plain
from memorizing_transformers_pytorch.utils.charts import check_plots_are_possible

SAMPLE_READS_TOKENS = 8_192
EXPLAINED_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model with a memory, test what the memory is worth, and let it write."""

    preset: str = "small"
    """The configuration to start from: small, enwik8, paper-200m, paper-1b or paper-8b."""
    config: Path | None = None
    """A YAML file with fields of a run, laid over the preset. (Flags are laid over both.)"""
    resume: bool = False
    """Resume the run in --output, exactly from its last checkpoint, with its own configuration."""
    overwrite: bool = False
    """Replace the run in --output."""
    evaluate: bool = True
    """At the end, evaluate on the held-out test documents, with controls."""
    evaluate_tokens: int = 16_384
    """Tokens to read of each of these documents. (`evaluate` reads whole documents, at any memory sizes.)"""
    evaluate_documents: int = 64
    """Documents to evaluate on, drawn at random; all if there are fewer."""
    sample_tokens: int = 160
    """Tokens to write at the end, continuing a held-out document; 0 for none."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The run."""


def main(arguments: Sequence[str], program: str) -> None:
    """Run `train` with these arguments. Raises what `training.loop.train` raises."""
    train_and_report(parse(arguments, program))


def parse(arguments: Sequence[str], program: str) -> Train:
    """The arguments over what they start from: a preset and a file, or with --resume the run itself.

    Raises ValueError for an unknown preset, a file or a run that cannot be read, or bad values.
    """
    first = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    first.add_argument("--output", type=Path)
    first.add_argument("--resume", action="store_true")
    first.add_argument("--overwrite", action="store_true")
    given = vars(first.parse_known_args(list(arguments))[0])
    if given.get("resume"):
        if "output" not in given or given.keys() & {"config", "preset", "overwrite"}:
            expected = "--resume with --output RUN, and without --preset, --config and --overwrite"
            raise ValueError(f"expected {expected}, got {' '.join(arguments)}")
        base = to_plain(config_of(given["output"]))
    else:
        base = merged({}, run_preset(given.get("preset", "small")))
        if "config" in given:
            base = merged(base, read_yaml(given["config"]))
    default = Train(run=from_plain(base))
    return parse_arguments(Train, arguments, program, default=default)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def train_and_report(options: Train) -> Path:
    """Train, then (on the main process) plot, evaluate and write a sample; returns the folder of the run."""
    for name, least in (("sample_tokens", 0), ("evaluate_tokens", 1), ("evaluate_documents", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"expected {name} to be at least {least}, got {getattr(options, name)}")
    check_plots_are_possible()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    is_main = os.environ.get("RANK", "0") == "0"
    folder = options.run.output or free_name(Path("runs") / options.preset)
    config = dataclasses.replace(options.run, output=folder)
    train(config, folder, resume=options.resume, overwrite=options.overwrite)
    if is_main:
        report(options, folder)
    return folder


def report(options: Train, folder: Path) -> None:
    """Evaluate the run on its test documents and let it continue one of them, if there are any; then write the page."""
    device = "cpu" if options.run.device == "cpu" else None
    run = load_run(folder)
    test = prepare(run.config.data, run.tokenizer.num_tokens, tokenizer=run.tokenizer).test
    documents = [n for n in range(len(test)) if len(test[n]) > 1]
    if not documents:
        print("no document was held out to evaluate on (--data.test)")
        draw(run, None)
        return
    if options.evaluate:
        size = run.config.model.max_knn_memories if run.config.model.layers_with_memory else 0
        length, count = options.evaluate_tokens, options.evaluate_documents
        evaluate_run(Evaluate(run=folder, memory=f"0,{size}", max_tokens=length, documents=count, device=device))
    longest = max(documents, key=lambda n: len(test[n]))
    name, tokens = test.names[longest], test[longest].tolist()
    if options.sample_tokens > 0:
        print(sample(options.sample_tokens, run, name, tokens))
    draw(run, (name, tokens))


def draw(run: LoadedRun, document: tuple[str, list[int]] | None) -> None:
    """Write report.html, with what the model looks up in this held-out document. If it fails, the training has still
    succeeded."""
    try:
        found, about = None, ""
        if document is not None and run.config.model.layers_with_memory:
            found, about = looked_up(run, *document)
        print(write_run_page(run.folder, found, about))
    except Exception as error:
        print(f"no report was written: {type(error).__name__}: {error}", file=sys.stderr)


def looked_up(run: LoadedRun, name: str, tokens: list[int]) -> tuple[Explanation, str]:
    """What the model looks up in a piece of a held-out document after it has read what comes before; and a sentence."""
    end, length = min(len(tokens), SAMPLE_READS_TOKENS), run.config.training.segment_length
    start = max(end - min(length, EXPLAINED_TOKENS), end // 2)
    with run.model.knn_memories_context(batch_size=1) as memories:
        number = memories.ledger.begin(name, 0, 0)
        session = Session(run.model, memories, batch_size=1, segment_length=length, documents=[number])
        session.read([tokens[:start]])
        session.close()
        memories.ledger.grow(number, start)
        piece = tokens[start:end]
        found = explain(run.model, piece, memories, tokenizer=run.tokenizer, contribution="ablate", most_passages=8)
    return found, f"{name}, held out: tokens {start:,} to {end - 1:,}, after the model has read those before them."


def sample(count: int, run: LoadedRun, name: str, tokens: list[int]) -> str:
    """Read a held-out document far beyond the local context, and continue it; written to sample.txt."""
    read = tokens[:SAMPLE_READS_TOKENS]
    with run.model.knn_memories_context(batch_size=1) as memories:
        [written] = generate(
            run.model,
            [read],
            memories,
            max_new_tokens=count,
            temperature=0.6,
            generator=torch.Generator().manual_seed(run.config.seed),
            segment_length=run.config.training.segment_length,
        )
    before, after = run.tokenizer.decode(read[-count:]), run.tokenizer.decode(written)
    text = f"{before}\n>>>>>>>> from here on the model writes <<<<<<<<\n{after}"
    (run.folder / "sample.txt").write_text(text, encoding="utf-8")
    line = "-" * 80
    return f"{name}, held out; the model has read {len(read)} tokens of it:\n{line}\n{text}\n{line}"
