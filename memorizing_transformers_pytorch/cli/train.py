"""`memorizing-transformers train`: a preset, over it a YAML file, over that flags; then what the run is worth."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path

import torch

from memorizing_transformers_pytorch.cli.evaluate import evaluate_run
from memorizing_transformers_pytorch.cli.options.evaluate import Evaluate
from memorizing_transformers_pytorch.cli.options.train import Train
from memorizing_transformers_pytorch.data.prepare import prepare
from memorizing_transformers_pytorch.explorer import Explanation, explain
from memorizing_transformers_pytorch.explorer.run_page import write_run_page
from memorizing_transformers_pytorch.model.generation import generate
from memorizing_transformers_pytorch.model.session import Session
from memorizing_transformers_pytorch.training.loop import train
from memorizing_transformers_pytorch.training.run import LoadedRun, free_name, load_run
from memorizing_transformers_pytorch.utils.charts import check_plots_are_possible

SAMPLE_READS_TOKENS = 8_192
EXPLAINED_TOKENS = 256


def main(options: Train) -> None:
    """Run `train`. Raises what `training.loop.train` raises."""
    train_and_report(options)


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
