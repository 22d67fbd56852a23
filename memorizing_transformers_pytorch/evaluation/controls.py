"""Memories that should be of no use: is it really the right memory, and what is in it, that helps?

other        the memory of another document, read as far: is it the right text that helps, or any?
shuffled     the document's own memory with its values permuted: are keys and values used together?
random keys  the document's own memory with keys of random direction: does it matter which entries are found?

Inside a `with` block the memories are so, for reading only; afterwards they are bit for bit what they were. Memories
with changed entries are searched exactly.

Shapes: R rows in scope, G key/value heads, N entries of a row, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList
from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.index.exact import ExactIndex

CONTROLS = ("other", "shuffled", "random keys")


@contextmanager
def control(name: str | None, memories: KNNMemoryList, generator: torch.Generator) -> Iterator[KNNMemoryList]:
    """The memories, with the rows in scope, as this control has them; None for the right ones.

    generator: on the CPU; of permutations and random keys. Raises ValueError for the memory of another document where
    there is no other row.
    """
    with ExitStack() as stack:
        if name == "other" and memories:
            rows = other_rows(memories[0].scoped_indices, memories[0].num_indices)
            stack.enter_context(memories.at_batch_indices(rows))
        elif name is not None:
            disturb = {"shuffled": shuffled_values, "random keys": random_keys}[name]
            for memory in memories:
                stack.enter_context(disturb(memory, generator))
        yield memories


def other_rows(rows: list[int], num_rows: int) -> list[int]:
    """For each of these rows another one: the next of them, or for a single row any other of all `num_rows`."""
    if num_rows < 2:
        raise ValueError(f"expected at least 2 documents for the memory of another one, got {num_rows}")
    return [*rows[1:], rows[0]] if len(rows) > 1 else [(rows[0] + 1) % num_rows]


def shuffled_values(memory: KNNMemory, generator: torch.Generator) -> AbstractContextManager[None]:
    """Inside, the values of each row in scope are permuted among its entries, all heads alike; only for reading."""

    def permuted(values: Vectors) -> Vectors:
        return values[:, torch.randperm(values.shape[1], generator=generator).to(values.device)]

    return _replaced(memory, "values", permuted)


def random_keys(memory: KNNMemory, generator: torch.Generator) -> AbstractContextManager[None]:
    """Inside, the keys of each row in scope have random directions, and the lengths they had; only for reading.

    (As the memory keeps numbers: rounded.)
    """

    def turned(keys: Vectors) -> Vectors:
        directions = F.normalize(torch.randn(keys.shape, generator=generator), dim=-1).to(keys.device)
        lengths: Tensor = keys.floats(torch.float32).norm(dim=-1, keepdim=True)
        return Vectors.of(directions.mul(lengths), memory.dtype)

    return _replaced(memory, "keys", turned)


@contextmanager
def _replaced(memory: KNNMemory, name: str, change: Callable[[Vectors], Vectors]) -> Iterator[None]:
    """Inside, the memory is a copy in which the keys or values (G, N, D) of each row in scope are changed so."""
    store = copy.deepcopy(memory.store)
    for row in memory.scoped_indices:
        entries = getattr(store, name)[row, :, : store.filled[row]]
        entries.copy_(change(entries.clone()))
    # An index that keeps something of the entries must not learn from what they are for a while.
    searcher, memory.searcher = memory.searcher, ExactIndex()
    before = memory.swap_store(store)
    try:
        yield
    finally:
        memory.swap_store(before).close()
        memory.searcher = searcher
