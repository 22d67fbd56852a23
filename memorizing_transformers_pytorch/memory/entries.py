"""Entries of a memory as tables of numbers: their sizes, and those that are about to be stored.

Shapes: R rows, G key/value heads, M capacity, N entries, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import checks
from memorizing_transformers_pytorch.memory.vectors import Vectors

ORIGIN_FIELDS = 3  # document id, position in the document, token id
POSITION = 1  # which of them
UNKNOWN = -1
PER_HEAD = {"keys", "values", "key_scales", "value_scales"}  # tables (R, G, C, ...); the others are (R, C, ...)


class StagedEntries(NamedTuple):
    """Entries that have been checked and converted, and can be stored without fail.

    rows: n row numbers. keys, values: (n, G, N, D). origins: (n, N, 3). mask: (n, N), False for what not to store.
    """

    rows: list[int]
    keys: Vectors
    values: Vectors
    origins: Tensor
    mask: Tensor | None

    def counts(self) -> list[int]:
        """How many entries each of the rows will be given."""
        return [self.keys.shape[2]] * len(self.rows) if self.mask is None else self.mask.sum(dim=1).tolist()

    def portions(self, size: int) -> Iterator[StagedEntries]:
        """The same entries in portions of at most `size` per row."""
        for start in range(0, self.keys.shape[2], size):
            some = slice(start, start + size)
            mask = None if self.mask is None else self.mask[:, some]
            yield StagedEntries(self.rows, self.keys[:, :, some], self.values[:, :, some], self.origins[:, some], mask)


class Sizes(NamedTuple):
    """Of a store: R rows, G key/value heads, M capacity, D head width, and how keys and values are kept."""

    rows: int
    kv_heads: int
    capacity: int
    dim: int
    dtype: torch.dtype

    def tables(self, room: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each table of a store that has places for so many entries in each row."""
        pairs = (self.rows, self.kv_heads, room, self.dim), self.dtype
        scales = (self.rows, self.kv_heads, room), torch.float32
        return {
            "keys": pairs,
            "values": pairs,
            **({"key_scales": scales, "value_scales": scales} if self.dtype == torch.int8 else {}),
            "origins": ((self.rows, room, ORIGIN_FIELDS), torch.int64),
        }

    @property
    def bytes_per_entry(self) -> int:
        """What a place in a row takes, in all tables."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tables(1).values()) // self.rows


def by_place(name: str, row: Tensor) -> Tensor:
    """One row of a table of that name, in which the places are the first dimension."""
    return row.transpose(0, 1) if name in PER_HEAD else row


def staged(
    sizes: Sizes,
    device: torch.device,
    rows: Sequence[int],
    memories: Tensor,
    mask: Tensor | None,
    origins: Tensor | None,
) -> StagedEntries:
    """What `KNNMemory.add` stores in these rows, as it lies in a store. Raises ValueError as that does."""
    memories = checks.checked_entries(memories, len(rows), sizes.kv_heads, sizes.dim)
    shape = len(rows), memories.shape[2]
    origins = torch.full((*shape, ORIGIN_FIELDS), UNKNOWN) if origins is None else origins
    origins = checks.checked_origins(mask, origins, shape, ORIGIN_FIELDS)
    floats = memories.detach().to(device, torch.float32 if sizes.dtype == torch.int8 else sizes.dtype)
    checks.check_finite(floats, mask)
    keys, values = (Vectors.of(part, sizes.dtype) for part in floats.unbind(dim=-2))
    mask = None if mask is None else mask.to(device)
    return StagedEntries(list(rows), keys, values, origins.to(device), mask)
