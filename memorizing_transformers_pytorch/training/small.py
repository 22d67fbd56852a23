"""The small run: in about ten minutes on two CPU cores, a model of a million parameters that uses its memory.

It trains on Python's standard library, one document per top-level package or module, and tests on packages that it has
never seen. The memorizing layer starts as an induction head and trains on its local context first, at full speed; the
memory joins for the last part.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from memorizing_transformers_pytorch.checkpoint import save_checkpoint
from memorizing_transformers_pytorch.config import ModelConfig
from memorizing_transformers_pytorch.data.corpora import Document, split_by_name, standard_library
from memorizing_transformers_pytorch.data.stream import DocumentStream
from memorizing_transformers_pytorch.data.tokenizer import BPETokenizer
from memorizing_transformers_pytorch.generation import generate
from memorizing_transformers_pytorch.model import MemorizingTransformer
from memorizing_transformers_pytorch.training.evaluate import evaluate
from memorizing_transformers_pytorch.training.loop import Step, TrainingConfig, train
from memorizing_transformers_pytorch.training.report import (
    Validation,
    check_plots_are_possible,
    loss_table,
    plot_curves,
)


@dataclass(frozen=True, kw_only=True)
class SmallRun:
    """Train a small model on Python's standard library, test it on unseen packages, and let it write."""

    output: Path = Path("runs/small")
    """Folder of the run; if it exists, the next free name (small-2, ...) is taken."""
    corpus: Path | None = None
    """A folder of Python files to use instead of the standard library."""
    steps: int = 2_400
    """Training steps, each over one segment of every row."""
    memory_share: float = 0.3
    """The last part of the steps, in which the memory is used."""
    rows: int = 4
    """Documents that are read side by side."""
    segment_length: int = 512
    """Tokens of each row in a step: the local context."""
    num_tokens: int = 1_024
    """Size of the vocabulary, a BPE trained on the training documents."""
    dim: int = 128
    """Model width."""
    depth: int = 4
    """Layers; the second one has the memory."""
    max_knn_memories: int = 8_192
    """Entries that a document can keep."""
    learning_rate: float = 4e-3
    """Peak of the learning rate."""
    held_out_tokens: int = 8_192
    """Tokens read of each held-out document, of those that have more."""
    validate_every: int = 250
    """Steps between validations, on the first quarter of the held-out tokens."""
    sample_tokens: int = 160
    """Tokens to write in the end."""
    seed: int = 0
    """Of the weights, of the order of documents, and of the sample."""

    def check(self) -> None:
        """Raises ValueError for options that make no sense. (Not when they are made: the command line speaks then.)"""
        sizes = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int" and f.name != "seed"
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"expected {name} to be at least 1, got {size}")
        if not 0 <= self.memory_share <= 1:
            raise ValueError(f"expected memory_share from 0 to 1, got {self.memory_share}")
        self.model_config()
        self.training_config()

    def to_dict(self) -> dict[str, Any]:
        """All options, with values that JSON can hold."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self).items()}

    def model_config(self) -> ModelConfig:
        return ModelConfig(
            num_tokens=self.num_tokens,
            dim=self.dim,
            depth=self.depth,
            dim_head=32,
            heads=4,
            memorizing_layers=min(2, self.depth),
            max_knn_memories=self.max_knn_memories,
            num_retrieved_memories=16,
            short_conv=4,
            qk_init="induction",
            pad_id=None,
        )

    def training_config(self) -> TrainingConfig:
        return TrainingConfig(
            steps=self.steps,
            memory_from_step=round(self.steps * (1 - self.memory_share)),
            learning_rate=self.learning_rate,
        )


def run(options: SmallRun) -> Path:
    """Train, validate, write and report; returns the folder with everything.

    Raises ValueError for options that make no sense, or a corpus without two held-out documents that are long enough.
    """
    options.check()
    check_plots_are_possible()
    torch.manual_seed(options.seed)
    training, held_out = split_by_name(standard_library(options.corpus))
    tokenizer = BPETokenizer.train((document.text for document in training), options.num_tokens)
    if tokenizer.num_tokens != options.num_tokens:
        raise ValueError(f"expected text for {options.num_tokens} tokens, got enough for {tokenizer.num_tokens}")
    held_out = [d for d in held_out if len(tokenizer.encode(d.text)) > options.held_out_tokens]
    if len(held_out) < 2:
        raise ValueError(f"expected 2 held-out documents of over {options.held_out_tokens} tokens, got {len(held_out)}")
    folder = _new_folder(options.output)
    tokenizer.save(folder / "tokenizer.json")
    _write_json(options.to_dict(), folder / "options.json")
    print(f"{len(training)} documents to train on, {len(held_out)} to test on; the run is kept in {folder}")

    model = MemorizingTransformer.from_config(options.model_config())
    validations = _train(model, _encode(tokenizer, training), _encode(tokenizer, held_out), options, folder)
    losses = evaluate(
        model,
        _encode(tokenizer, held_out),
        segment_length=options.segment_length,
        max_tokens=options.held_out_tokens,
        controls=True,
    )
    _report(losses, validations, options, folder)
    _sample(model, tokenizer, held_out[0], options, folder)
    return folder


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _encode(tokenizer: BPETokenizer, documents: Sequence[Document]) -> list[np.ndarray]:
    return [np.array(tokenizer.encode(document.text), dtype=np.int32) for document in documents]


def _new_folder(wanted: Path) -> Path:
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    folder.mkdir(parents=True)
    return folder


def _train(
    model: MemorizingTransformer,
    training: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    options: SmallRun,
    folder: Path,
) -> list[Validation]:
    stream = DocumentStream(training, rows=options.rows, segment_length=options.segment_length, seed=options.seed)
    config = options.training_config()
    validations: list[Validation] = []
    with (folder / "metrics.jsonl").open("w") as metrics, tqdm(total=config.steps, unit=" steps") as progress:

        def note(record: Step | Validation) -> None:
            metrics.write(json.dumps(record._asdict()) + "\n")

        for step in train(model, stream, config):
            note(step)
            _show(progress, step)
            if step.number % options.validate_every == 0 or step.number in (config.memory_from_step, config.steps):
                save_checkpoint(model, folder / "model.safetensors")
                validations.append(_validate(model, held_out, options, step.number))
                note(validations[-1])
                off, on = validations[-1].off, validations[-1].on
                tqdm.write(f"step {step.number:5}: held-out loss {off:.3f} with the memory off, {on:.3f} with it on")
    return validations


def _show(progress: Any, step: Step) -> None:
    """Loss, tokens per second and how full the memory is."""
    progress.update()
    rate = (progress.format_dict["rate"] or 0) * step.tokens / step.number
    shown = {"loss": f"{step.loss:.3f}", "tokens/s": f"{rate:.0f}", "entries": f"{step.entries:.0f}"}
    progress.set_postfix(shown, refresh=False)


def _validate(model: MemorizingTransformer, held_out: Sequence[np.ndarray], options: SmallRun, step: int) -> Validation:
    tokens = max(options.held_out_tokens // 4, 1)
    losses = evaluate(model, held_out, segment_length=options.segment_length, max_tokens=tokens)
    return Validation(step, losses["off"].mean().item(), losses["on"].mean().item())


def _report(losses: dict[str, Tensor], validations: Sequence[Validation], options: SmallRun, folder: Path) -> None:
    documents, tokens = losses["off"].shape
    table = loss_table(losses)
    print(f"\nHeld out: the first {tokens} tokens of {documents} documents, nats per token\n{table}")
    share = f"{options.memory_share:.0%}"
    print(f"The same weights in each line; they were trained with the memory for the last {share} of the steps.\n")
    results = {
        "loss": {mode: loss.mean().item() for mode, loss in losses.items()},
        "loss_by_document": {mode: loss.mean(dim=1).tolist() for mode, loss in losses.items()},
        "validations": [validation._asdict() for validation in validations],
    }
    _write_json(results, folder / "results.json")
    memory_from_step = options.training_config().memory_from_step
    plot_curves(validations, losses, memory_from_step, options.segment_length, folder / "curves.png")
    print(f"curves: {folder / 'curves.png'}\nmodel:  {folder / 'model.safetensors'}\n")


def _sample(
    model: MemorizingTransformer, tokenizer: BPETokenizer, document: Document, options: SmallRun, folder: Path
) -> None:
    """Read a held-out document far beyond the local context, and go on writing it."""
    read = tokenizer.encode(document.text)[: options.held_out_tokens]
    with model.knn_memories_context(batch_size=1) as memories:
        [written] = generate(
            model,
            [read],
            memories,
            max_new_tokens=options.sample_tokens,
            temperature=0.6,
            generator=torch.Generator().manual_seed(options.seed),
            segment_length=options.segment_length,
        )
    before, after = tokenizer.decode(read[-options.sample_tokens :]), tokenizer.decode(written)
    text = f"{before}\n>>>>>>>> from here on the model writes <<<<<<<<\n{after}"
    (folder / "sample.txt").write_text(text, encoding="utf-8")
    print(f"{document.name}, held out; the model has read {len(read)} tokens of it:\n{'-' * 80}\n{text}\n{'-' * 80}")
