"""Entries of a memory as tables of numbers: how these are kept, their sizes, and entries that are about to be stored.

Keys and values are floating-point numbers, or int8 codes with one scale for each vector. A code is the number divided
by the scale, rounded; the scale is the largest absolute value divided by 127. So no number is off by more than half a
scale, and a vector of zeros has scale 0. What is kept is what counts: whoever reads codes gets code times scale in
float32, a block or a few vectors at a time, whatever is computed with that.

Shapes: R rows, G key/value heads, M capacity, N entries or vectors, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.checks import NonFiniteError

ORIGIN_FIELDS = 3  # document id, position in the document, token id
POSITION = 1  # which of them
UNKNOWN = -1
PER_HEAD = {"keys", "values", "key_scales", "value_scales"}  # tables (R, G, C, ...); the others are (R, C, ...)
LARGEST_CODE = 127  # of either sign: -128 is not used
LARGEST = (1 - 2.0**-23) * 2.0**128  # float32 of which 127 times the 127th part does not overflow
INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Vectors:
    """numbers: (..., N, D). scales: (..., N) float32 if those are codes, else None.

    Indexed, joined and copied like a tensor, but for the last dimension: a vector stays whole.
    """

    numbers: Tensor
    scales: Tensor | None = None

    @classmethod
    def of(cls, floats: Tensor, dtype: torch.dtype) -> Vectors:
        """Floating-point vectors, kept so: converted, or as codes for torch.int8."""
        return cls(*_coded(floats.float())) if dtype == torch.int8 else cls(floats.to(dtype))

    @classmethod
    def cat(cls, parts: Sequence[Vectors], dim: int = 0) -> Vectors:
        """Several, one after the other along a dimension counted from the first."""
        scales = [part.scales for part in parts if part.scales is not None]
        return cls(torch.cat([part.numbers for part in parts], dim), torch.cat(scales, dim) if scales else None)

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    @property
    def float_dtype(self) -> torch.dtype:
        """That of `floats()`."""
        return self.numbers.dtype if self.scales is None else torch.float32

    def floats(self, dtype: torch.dtype | None = None) -> Tensor:
        """(..., N, D) as they are kept, or converted to another dtype. A copy only where one is needed."""
        kept = self.numbers if self.scales is None else self.numbers.float().mul_(self.scales.unsqueeze(-1))
        return kept if dtype is None else kept.to(dtype)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Vectors:
        return self._each(lambda part: part[index])

    def __iter__(self) -> Iterator[Vectors]:
        return (self[i] for i in range(len(self)))

    def at(self, places: Tensor) -> Vectors:
        """Copies of the vectors in these places (n,) of N, in this order."""
        dim = self.numbers.ndim - 2
        return self._each(lambda part: part.index_select(dim, places))

    def flatten(self, start: int, end: int) -> Vectors:
        """With the dimensions from `start` to `end` as one."""
        return self._each(lambda part: part.flatten(start, end))

    def clone(self) -> Vectors:
        return self._each(torch.clone)

    def copy_(self, other: Vectors) -> None:
        """Become, in place, what others are. Raises ValueError for numbers in the place of codes, and the reverse."""
        if (self.scales is None) != (other.scales is None):
            raise ValueError(f"expected vectors kept as {self.numbers.dtype}, got {other.numbers.dtype}")
        self.numbers.copy_(other.numbers)
        if self.scales is not None and other.scales is not None:
            self.scales.copy_(other.scales)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Vectors:
        return Vectors(change(self.numbers), None if self.scales is None else change(self.scales))


def _coded(floats: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (..., D) -> codes (..., D) int8 and scales (...)."""
    largest = floats.abs().amax(dim=-1).clamp_max(LARGEST)
    scales = largest / torch.full_like(largest, LARGEST_CODE)  # by a number a GPU would not divide, but multiply
    steps = floats / scales.where(scales > 0, 1).unsqueeze(-1)
    return steps.round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), scales


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


def staged(
    sizes: Sizes,
    device: torch.device,
    rows: Sequence[int],
    memories: Tensor,
    mask: Tensor | None,
    origins: Tensor | None,
) -> StagedEntries:
    """What `KNNMemory.add` stores in these rows, as it lies in a store. Raises ValueError as that does."""
    memories = _checked_entries(memories, len(rows), sizes.kv_heads, sizes.dim)
    shape = len(rows), memories.shape[2]
    origins = torch.full((*shape, ORIGIN_FIELDS), UNKNOWN) if origins is None else origins
    origins = _checked_origins(mask, origins, shape)
    floats = memories.detach().to(device, torch.float32 if sizes.dtype == torch.int8 else sizes.dtype)
    _check_finite(floats, mask)
    keys, values = (Vectors.of(part, sizes.dtype) for part in floats.unbind(dim=-2))
    mask = None if mask is None else mask.to(device)
    return StagedEntries(list(rows), keys, values, origins.to(device), mask)


def _checked_entries(memories: Tensor, rows: int, heads: int, dim: int) -> Tensor:
    """The entries, of `heads` key/value heads, as (R, G, N, 2, D)."""
    if heads == 1 and memories.ndim == 4:
        memories = memories.unsqueeze(1)
    fits = memories.ndim == 5 and memories.shape[:2] == (rows, heads)
    if not fits or memories.shape[3:] != (2, dim):
        expected = f"entries ({rows} rows, {heads} key/value heads, any number, 2, {dim})"
        raise ValueError(f"expected {expected}, got {tuple(memories.shape)}")
    if not memories.is_floating_point():
        raise ValueError(f"expected floating-point entries, got {memories.dtype}")
    return memories


def _checked_origins(mask: Tensor | None, origins: Tensor, shape: tuple[int, int]) -> Tensor:
    """mask: bool (R, N), or None for all. origins: integers (R, N, 3), returned as int64."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise ValueError(f"expected a bool mask {shape}, got {mask.dtype} {tuple(mask.shape)}")
    if origins.shape != (*shape, ORIGIN_FIELDS):
        raise ValueError(f"expected origins {(*shape, ORIGIN_FIELDS)}, got {tuple(origins.shape)}")
    return as_int64(origins, "origins")


def _check_finite(entries: Tensor, mask: Tensor | None) -> None:
    """entries (R, G, N, 2, D), of which only those where the mask (R, N) is True matter."""
    checked = entries if mask is None else entries.masked_fill(~mask[:, None, :, None, None].to(entries.device), 0)
    if not bool(checked.isfinite().all()):
        raise NonFiniteError(f"expected keys and values that are finite in {entries.dtype}, got NaN or infinity")


def as_int64(numbers: Any, what: str) -> Tensor:
    """A tensor of integers as int64, as PyTorch computes little with the unsigned types.

    Raises ValueError for anything else, bool included, and for numbers from 2**63 on.
    """
    if not isinstance(numbers, Tensor) or numbers.dtype not in INTEGERS:
        got = str(numbers.dtype) if isinstance(numbers, Tensor) else type(numbers).__name__
        raise ValueError(f"expected {what} to be a tensor of integers, got {got}")
    converted = numbers.long()
    if numbers.dtype == torch.uint64 and bool((converted < 0).any()):
        raise ValueError(f"expected {what} below 2**63")
    return converted
