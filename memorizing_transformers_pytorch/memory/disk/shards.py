"""Files of tensors in the format of safetensors, written piece by piece and mapped into memory when they are read.

The library safetensors writes a file from tensors that lie in memory as a whole. A memory may be larger than what is
left of it, so files are written here as their pieces come, with the checksum; they are read by the library.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

ALIGNMENT = 64  # bytes, of where the tensors begin
OBSOLETE = {"written", "usage"}  # tables that older versions wrote; not read
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
}


@dataclass(frozen=True)
class File:
    """A file of a folder: its name, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


class StreamedTensor(NamedTuple):
    """A tensor to be written: its dtype and shape, and pieces that follow each other in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(path: Path, tables: Mapping[str, StreamedTensor]) -> File:
    """Write a new file and bring it to the disk. Raises OSError if it cannot be written, and leaves none then."""
    names = sorted(tables, key=lambda name: (-tables[name].dtype.itemsize, name))  # so that each is aligned
    try:
        with path.open("xb") as file:
            sums, size = hashlib.sha256(), 0

            def put(data: bytes | memoryview) -> None:
                nonlocal size
                file.write(data)
                sums.update(data)
                size += len(data)

            put(_header({name: tables[name] for name in names}))
            for name in names:
                for piece in tables[name].pieces:
                    put(to_bytes(piece).data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return File(path.name, size, sums.hexdigest())


def to_bytes(table: Tensor) -> np.ndarray:
    """The numbers of a table, as they lie in memory."""
    return table.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _header(tables: Mapping[str, StreamedTensor]) -> bytes:
    entries, start = {}, 0
    for name, table in tables.items():
        stop = start + table.num_bytes
        entries[name] = {"dtype": DTYPES[table.dtype], "shape": list(table.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_tensors(folder: Path, file: File, *, verify: bool) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory: pages are read when they are used, shared with other processes, and
    copied when they are written to, which does not change the file. `OBSOLETE` tables are left out.

    verify: whether to compare the checksum, for which all of it is read. Raises FileNotFoundError if there is no such
    file, and ValueError if it is another.
    """
    path = folder / file.name
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"expected a file {file.name} in {str(folder)!r}, got a link or something else")
    if status.st_size != file.bytes:
        raise ValueError(f"expected {file.bytes:,} bytes in {str(path)!r}, got {status.st_size:,}")
    if verify:
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != file.sha256:
            raise ValueError(f"expected SHA-256 {file.sha256} of {str(path)!r}, got {found}")
    try:
        with safe_open(path, framework="pt") as opened:
            names = [name for name in opened.keys() if name.rpartition(".")[2] not in OBSOLETE]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, RuntimeError, AttributeError, KeyError) as error:
        raise ValueError(f"expected a safetensors file, got {str(path)!r}: {error}") from error
