"""Where the numbers of a memory lie: in RAM that costs nothing until it is written, or in files; and as bytes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_BYTES_AS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def fresh_folder(directory: Path) -> Path:
    """A new folder in this one. Raises ValueError where none can be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="knn-memory-", dir=directory))
    except OSError as error:
        raise ValueError(f"expected a directory for files, got {str(directory)!r}: {error.strerror}") from error


def remove_folder(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def map_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, shared: bool = True) -> Tensor:
    """A file as a tensor. shared: whether changes reach the file; it is made if it is not there."""
    return torch.from_file(str(path), shared=shared, size=int(np.prod(shape)), dtype=dtype).view(shape)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks the system for zeroed pages, which cost nothing until they are written; torch.zeros touches them all.
    return torch.from_numpy(np.zeros(shape, dtype=_BYTES_AS[dtype.itemsize])).view(dtype)


def to_bytes(table: Tensor) -> np.ndarray:
    """The numbers of a table, as they lie in memory."""
    return table.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def from_bytes(data: np.ndarray, like: Tensor) -> Tensor:
    """The table that `to_bytes` was given, which has the dtype and shape of another one."""
    table = torch.empty(like.shape, dtype=like.dtype)
    table.view(-1).view(torch.uint8).numpy()[:] = data
    return table
