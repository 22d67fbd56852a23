"""Whether what is passed to a memory fits it; if not, ValueError that names what was expected and what came.

Shapes: R rows in scope, H query heads, G key/value heads, N entries, D head width.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import SupportsIndex

import torch
from torch import Tensor

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class NonFiniteError(ValueError):
    """NaN or infinity where numbers were expected: the numbers went wrong, not their shape."""


@functools.cache
def warn_once(message: str, stacklevel: int = 3) -> None:
    """Warn about something that is accepted but has no effect; once per message and process."""
    warnings.warn(message, stacklevel=stacklevel)


def check_options(
    sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, index: str, *, mapped: bool
) -> None:
    """Whether there can be such a memory. sizes: numbers by the names of the arguments."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"expected {name} to be at least 1, got {size}")
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f"expected dtype to be one of {STORAGE_DTYPES}, got {dtype}")
    if device.type != "cpu":
        check_device(device)
        if mapped:
            raise ValueError(f"expected device 'cpu' for a memory-mapped memory, got {str(device)!r}")
        if index not in ("exact", "auto"):
            raise ValueError(f"expected index 'exact' or 'auto' for a memory on {str(device)!r}, got {index!r}")


def check_capacity(max_memories: int) -> None:
    """Whether a row can have so many places."""
    if max_memories < 1:
        raise ValueError(f"expected max_memories to be at least 1, got {max_memories}")


def directory_of(
    directory: str | Path | None, memmap_filename: str | Path | None, multiprocessing: bool | None
) -> Path | None:
    """Where files of a memory go, as the arguments of the original package say. Warns of those without effect."""
    if multiprocessing is not None:
        warn_once("multiprocessing has no effect: the exact search already uses every core", 4)
    if memmap_filename is not None:
        directory = Path(memmap_filename).parent if directory is None else directory
        warn_once(f"memmap_filename only chooses the directory, {directory}; files get unique names", 4)
    return None if directory is None else Path(directory)


def check_device(device: torch.device | str) -> None:
    """Whether there is such a device."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError):
        raise ValueError(f"expected a device of this machine, such as cpu or cuda, got {str(device)!r}") from None


def checked_rows(indices: Iterable[int], num_rows: int) -> list[int]:
    """The rows as distinct integers below num_rows."""
    given = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    if not all(isinstance(row, SupportsIndex) and not isinstance(row, bool) for row in given):
        raise ValueError(f"expected rows as integers, got {given}")
    rows = [operator.index(row) for row in given]
    if len(set(rows)) != len(rows) or not all(0 <= row < num_rows for row in rows):
        raise ValueError(f"expected distinct rows from 0 to {num_rows - 1}, got {rows}")
    return rows


def rows_in_scope(indices: int | Iterable[int] | None, scope: list[int], num_rows: int) -> list[int]:
    """The rows, or all of the scope. Raises ValueError for rows outside it."""
    if indices is None:
        return scope
    rows = checked_rows(indices if isinstance(indices, Iterable) else [indices], num_rows)
    if not set(rows) <= set(scope):
        raise ValueError(f"expected rows of the scope {scope}, got {rows}")
    return rows


def check_slots(slots: Tensor, num_slots: int) -> None:
    """Whether there are these slots."""
    if slots.numel() > 0 and not (int(slots.min()) >= 0 and int(slots.max()) < num_slots):
        raise ValueError(f"expected slots from 0 to {num_slots - 1}, got {int(slots.min())} to {int(slots.max())}")
