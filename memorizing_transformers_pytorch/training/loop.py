"""The training loop: one segment of each row per step, memories carried from step to step and cleared per document.

It knows nothing of where documents come from, nor of what is done with the record of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from memorizing_transformers_pytorch.data.stream import DocumentStream
from memorizing_transformers_pytorch.model import MemorizingTransformer


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and how fast. Raises ValueError for numbers that make no sense."""

    steps: int
    """Optimiser steps, each over one segment of every row."""
    memory_from_step: int = 0
    """Read and write the memories from this step on; train on the local context alone before (a young model has no use
    for a memory, and it slows learning)."""
    learning_rate: float = 2e-3
    """Peak of the learning rate, after warm-up."""
    warmup_steps: int = 50
    """Steps of linear warm-up; a cosine decay to a tenth of the peak follows."""
    weight_decay: float = 0.01
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    def __post_init__(self) -> None:
        for name in ("steps", "memory_from_step", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} to be at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"expected {name} to be above 0, got {getattr(self, name)}")

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class Step(NamedTuple):
    """What one step did.

    loss: nats per token. tokens: trained on so far. entries: in the memory of a row, on average.
    """

    number: int
    loss: float
    tokens: int
    entries: float


def train(model: MemorizingTransformer, stream: DocumentStream, config: TrainingConfig) -> Iterator[Step]:
    """Train the model in place; yields after each step.

    Raises FloatingPointError, naming the step, when the loss is not finite; the model is then as before that step.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    model.train()
    tokens, xl_memories = 0, model.initial_state(stream.rows)
    with model.knn_memories_context(batch_size=stream.rows) as memories:
        for number in range(config.steps):
            batch = next(stream).to(model.device)
            memories.clear_memory(batch.starts)
            xl_memories = xl_memories.cleared(batch.starts)
            result = model(
                batch.tokens,
                memories if number >= config.memory_from_step else None,
                xl_memories,
                labels=batch.labels,
                mask=batch.mask,
                origins=batch.origins,
            )
            loss, xl_memories = result if model.carries_state else (result, xl_memories)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss of step {number} is {loss.item()}")
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(number)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            tokens += int(batch.mask.sum())
            filled = memories[0].num_entries if memories else (0,)
            yield Step(number + 1, loss.item(), tokens, sum(filled) / len(filled))
