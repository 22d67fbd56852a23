"""The shortest way in: the enwik8 training of the package memorizing-transformers-pytorch 0.4.1, on our model.

    python train.py path/to/enwik8.zip

Bytes, width 512, 8 layers, memory in layer 4, XL memory in layers 7 and 8. Each step reads 5 segments of 512 bytes from
16 random places, with fresh memories. Unlike the original it validates on the validation split.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from memorizing_transformers_pytorch import MemorizingTransformer, ModelConfig
from memorizing_transformers_pytorch.checkpoint import save_checkpoint
from memorizing_transformers_pytorch.data.corpora import read_enwik8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train on enwik8 as the original package did."""

    enwik8: tyro.conf.Positional[Path]
    """enwik8 (100,000,000 bytes) or enwik8.zip."""
    steps: int = 100_000
    """Optimiser steps."""
    batch_size: int = 16
    """Places that are read side by side."""
    segments: int = 5
    """Segments of a step."""
    segment_length: int = 512
    """Bytes of a segment."""
    learning_rate: float = 2e-4
    """Of Adam."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this norm."""
    validate_every: int = 100
    """Steps between validations."""
    output: Path = Path("runs/enwik8.safetensors")
    """Checkpoint, a new file, written anew at every validation."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    seed: int = 0
    """Of the weights and of the places."""


def random_places(data: np.ndarray, options: Options, generator: np.random.Generator) -> Tensor:
    """(batch_size, segments * segment_length + 1) bytes, from random places of the data."""
    length = options.segments * options.segment_length + 1
    starts = generator.integers(0, len(data) - length, size=options.batch_size)
    return torch.from_numpy(np.stack([data[start : start + length] for start in starts]).astype(np.int64))


def read_segments(model: MemorizingTransformer, tokens: Tensor, options: Options) -> float:
    """Read the segments in order with fresh memories; the mean loss. Where gradients are on, they are accumulated."""
    total, xl_memories = 0.0, None
    with model.knn_memories_context(batch_size=len(tokens)) as knn_memories:
        for start in range(0, options.segments * options.segment_length, options.segment_length):
            segment = tokens[:, start : start + options.segment_length + 1]
            loss, xl_memories = model(segment[:, :-1], knn_memories, xl_memories, labels=segment[:, 1:])
            if torch.is_grad_enabled():
                (loss / options.segments).backward()
            total += loss.item() / options.segments
    return total


@torch.no_grad()
def validate(model: MemorizingTransformer, data: np.ndarray, options: Options) -> float:
    """The loss on the same places of the data every time."""
    tokens = random_places(data, options, np.random.default_rng(options.seed))
    with model.evaluating():
        return read_segments(model, tokens.to(model.device), options)


def main(options: Options, config: ModelConfig) -> None:
    """Train, and print the validation loss now and then. Raises ValueError if the checkpoint would replace another."""
    if options.output.exists():
        raise ValueError(f"expected a new file for the checkpoint, got {str(options.output)!r}, which exists")
    data = read_enwik8(options.enwik8)
    torch.manual_seed(options.seed)
    places = np.random.default_rng(options.seed)
    model = MemorizingTransformer.from_config(config).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    for step in (progress := tqdm(range(options.steps), unit=" steps")):
        loss = read_segments(model, random_places(data["train"], options, places).to(options.device), options)
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss:.3f}")
        if step % options.validate_every == 0 or step == options.steps - 1:
            tqdm.write(f"step {step}: validation loss {validate(model, data['valid'], options):.3f} nats per byte")
            save_checkpoint(model, options.output)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options), ModelConfig.preset("enwik8"))
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
