"""Keys or values as they are kept: floating-point numbers, or int8 codes with one scale for each vector.

A code is the number divided by the scale, rounded; the scale is the largest absolute value divided by 127. So no number
is off by more than half a scale, and a vector of zeros has scale 0. What is kept is what counts: whoever reads codes
gets code times scale in float32, a block or a few vectors at a time, whatever is computed with that.

Shapes: N vectors, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST_CODE = 127  # of either sign: -128 is not used
LARGEST = (1 - 2.0**-23) * 2.0**128  # float32 of which 127 times the 127th part does not overflow


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
