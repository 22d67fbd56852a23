"""Integers of any type, as PyTorch, NumPy and Arrow have them, as int64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def as_int64(numbers: Any, what: str) -> Tensor:
    """A tensor of integers as int64, as PyTorch computes little with the unsigned types.

    Raises ValueError for anything else, bool included, and for numbers from 2**63 on.
    """
    if not isinstance(numbers, Tensor) or numbers.dtype not in SIGNED + UNSIGNED:
        got = str(numbers.dtype) if isinstance(numbers, Tensor) else type(numbers).__name__
        raise ValueError(f"expected {what} to be a tensor of integers, got {got}")
    converted = numbers.long()
    if numbers.dtype == torch.uint64 and bool((converted < 0).any()):
        raise ValueError(f"expected {what} below 2**63")
    return converted
