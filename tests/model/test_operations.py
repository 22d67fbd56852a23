"""How many operations PyTorch dispatches in a training step: what a GPU waits for, counted instead of timed."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memorizing_transformers_pytorch import MemorizingTransformer

SEGMENT, DEPTH, MEMORY = 512, 8, 1_024


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


def dispatched(with_memory: bool) -> int:
    """In the forward and backward pass of the enwik8 model's shape, but for its width, with a full memory or none."""
    torch.manual_seed(0)
    sizes = {"num_tokens": 256, "dim": 32, "depth": DEPTH, "heads": 2, "dim_head": 8, "memorizing_layers": 4}
    model = MemorizingTransformer(**sizes, xl_memory_layers=(7, 8), xl_max_memories=SEGMENT, max_knn_memories=MEMORY)  # type: ignore[arg-type]
    memories = model.create_knn_memories(batch_size=2) if with_memory else None
    tokens, xl_memories, counted = torch.randint(256, (2, SEGMENT)), None, Counted()
    for last in (False, False, False, True):
        with counted if last else torch.enable_grad():
            loss, xl_memories = model(tokens, memories, xl_memories, labels=tokens)
            loss.backward()
    assert memories is None or memories[0].num_entries == (MEMORY, MEMORY)
    return counted.count


def test_a_memory_adds_few_operations_to_a_training_step() -> None:
    without, with_memory = dispatched(with_memory=False), dispatched(with_memory=True)
    print(f"{without:,} operations without a memory, {with_memory:,} with one")
    assert without < with_memory <= 1.15 * without
