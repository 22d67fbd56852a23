"""What a checkpoint holds of a trainer beside weights and optimiser: how far it is, and what each process has alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import dacite
import torch
from torch import Tensor

from memorizing_transformers_pytorch.model.segment import XLMemories
from memorizing_transformers_pytorch.training.trainer import Progress, Trainer


def shared_state(trainer: Trainer) -> dict[str, Any]:
    """What is the same on every process, for JSON."""
    return {"progress": dataclasses.asdict(trainer.progress), "stream": trainer.stream.state_dict()}


def load_shared_state(trainer: Trainer, state: dict[str, Any]) -> None:
    trainer.stream.load_state_dict(state["stream"])
    try:
        trainer.progress = dacite.from_dict(Progress, state["progress"], dacite.Config(strict=True))
    except dacite.DaciteError as error:
        raise ValueError(f"expected the progress of a run, got: {error}") from None


def own_state(trainer: Trainer) -> dict[str, Tensor]:
    """What is of this process alone: memories, state of the rows, random numbers."""
    tensors = _prefixed("memories.", trainer.memories.state_dict())
    for group, state in enumerate(trainer.states):
        tensors |= _prefixed(f"states.{group}.", state.state_dict())
    tensors["random.cpu"] = torch.get_rng_state()
    if trainer.accelerator.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def load_own_state(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    device = trainer.accelerator.device
    if trainer.memories:
        capacity, most = int(tensors["memories.0.capacity"]), trainer.config.model.max_knn_memories
        if not 1 <= capacity <= most:
            raise ValueError(f"expected memories of 1 to {most} entries, got {capacity}")
        trainer.memories.resize(capacity)
    trainer.memories.load_state_dict(_within("memories.", tensors))
    trainer.states = [
        XLMemories.from_state_dict(_within(f"states.{group}.", tensors), device) for group in range(len(trainer.groups))
    ]
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _within(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
