"""Where entries lie: for each row a ring of fixed capacity in which the newest entry replaces the oldest.

A store knows rows and slots. It checks nothing that its caller (`KNNMemory`) has checked, and searches nothing.
All heads of a row fill together, so a row has one ring of places, and each place holds a key and a value per head.
The entries of a row always occupy places 0 ... filled - 1, which is what lets a search read them as one buffer.

Shapes: R rows, G key/value heads, M capacity, N entries added, D head width.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.index import Ring
from memorizing_transformers_pytorch.memory.retrieved import Lookup

ORIGIN_FIELDS = 3  # document id, position in the document, token id
POSITION = 1  # which of them
UNKNOWN = -1
COPIED_AT_ONCE = 4_096  # entries, that stay in cache on their way

_lives = itertools.count(1)  # see `Ring.life`

_BYTES_AS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


class StagedEntries(NamedTuple):
    """Entries that have been checked and converted, and can be stored without fail.

    rows: n row numbers. keys, values: (n, G, N, D). origins: (n, N, 3). mask: (n, N), False for what not to store.
    """

    rows: list[int]
    keys: Tensor
    values: Tensor
    origins: Tensor
    mask: Tensor | None

    def counts(self) -> list[int]:
        """How many entries each of the rows will be given."""
        return [self.keys.shape[2]] * len(self.rows) if self.mask is None else self.mask.sum(dim=1).tolist()

    def portions(self, size: int) -> Iterator[StagedEntries]:
        """The same entries, so many of each row at a time."""
        for start in range(0, self.keys.shape[2], size):
            some = slice(start, start + size)
            mask = None if self.mask is None else self.mask[:, some]
            yield StagedEntries(self.rows, self.keys[:, :, some], self.values[:, :, some], self.origins[:, some], mask)


class Store:
    """Entries of R rows in RAM, on a GPU, or (with a directory) in memory-mapped files of its own.

    keys, values: (R, G, M, D). origins: (R, M, 3) int64. written: (R, M) int64, the clock at which a place was
    last written. filled: entries in each row. cursors: the place in each that is written next. written_to: how many
    entries each was given since it was last empty. readers: lookups that must not lose what they have found. Files lie
    in a fresh folder and are removed by `close`, or at the latest when the store is collected.
    """

    def __init__(
        self,
        *,
        rows: int,
        kv_heads: int,
        capacity: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        directory: Path | None,
    ) -> None:
        self.capacity = capacity
        self.filled = [0] * rows
        self.clock = 0
        self.readers: weakref.WeakSet[Lookup] = weakref.WeakSet()
        self.cursors = [0] * rows
        self.written_to = [0] * rows
        self._lives = [next(_lives) for _ in range(rows)]
        self._folder = None if directory is None else _fresh_folder(directory)
        self._remove_files = weakref.finalize(self, _remove_folder, self._folder)

        def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            # Outside inference mode, so that a memory made inside it can still be written outside.
            with torch.inference_mode(False):
                if self._folder is not None:
                    return _map_file(self._folder / name, shape, dtype)
                return _zeros(shape, dtype, device)

        self.keys = allocate("keys", (rows, kv_heads, capacity, dim), dtype)
        self.values = allocate("values", (rows, kv_heads, capacity, dim), dtype)
        self.origins = allocate("origins", (rows, capacity, ORIGIN_FIELDS), torch.int64)
        self.written = allocate("written", (rows, capacity), torch.int64)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def write(self, entries: StagedEntries) -> None:
        """Put entries, in order, over the oldest of their rows."""
        self.clock += 1
        for i, row in enumerate(entries.rows):
            chosen = slice(None) if entries.mask is None else entries.mask[i].nonzero().squeeze(-1)
            keys, values = entries.keys[i][:, chosen], entries.values[i][:, chosen]
            self._write_row(row, keys, values, entries.origins[i][chosen])

    def _write_row(self, row: int, keys: Tensor, values: Tensor, origins: Tensor) -> None:
        count = keys.shape[1]
        cursor = (self.cursors[row] + max(count - self.capacity, 0)) % self.capacity
        kept = min(count, self.capacity)
        start = count - kept
        while start < count:  # at most twice: up to the end of the ring, then from its beginning
            run = min(count - start, self.capacity - cursor)
            here, there = slice(cursor, cursor + run), slice(start, start + run)
            for reader in self.readers:
                reader.keep(row, here)
            self.keys[row, :, here] = keys[:, there]
            self.values[row, :, here] = values[:, there]
            self.origins[row, here] = origins[there]
            self.written[row, here] = self.clock
            start, cursor = start + run, (cursor + run) % self.capacity
        self.cursors[row] = cursor
        self.filled[row] = min(self.filled[row] + count, self.capacity)
        self.written_to[row] += count

    def oldest(self, row: int, count: int) -> StagedEntries:
        """Copies of so many entries of a row, the oldest first."""
        first = self.cursors[row] - self.filled[row]
        places = (first + torch.arange(count, device=self.device)) % self.capacity
        keys, values = self.keys[row][None, :, places], self.values[row][None, :, places]
        return StagedEntries([row], keys, values, self.origins[row][None, places], None)

    def clear(self, rows: list[int]) -> None:
        for row in rows:
            self.filled[row] = self.cursors[row] = self.written_to[row] = 0
            self._lives[row] = next(_lives)

    def ring(self, row: int) -> Ring:
        """The entries of a row as an index sees them."""
        keys = self.keys[row, :, : self.filled[row]]
        return Ring(keys, row, self.cursors[row], self.written_to[row], self._lives[row])

    def empty_like(self, capacity: int | None = None) -> Store:
        """A new store of the same kind, with another capacity if given, in a folder of its own beside this one's."""
        rows, kv_heads, own_capacity, dim = self.keys.shape
        return Store(
            rows=rows,
            kv_heads=kv_heads,
            capacity=own_capacity if capacity is None else capacity,
            dim=dim,
            dtype=self.keys.dtype,
            device=self.device,
            directory=None if self._folder is None else self._folder.parent,
        )

    def resized(self, capacity: int) -> Store:
        """A new store with the newest entries of each row. This one stays as it is, and so do its lookups."""
        new = self.empty_like(capacity)
        new.clock = self.clock
        for row, filled in enumerate(self.filled):
            kept = min(filled, capacity)
            places = (self.cursors[row] - kept + torch.arange(kept, device=self.device)) % self.capacity
            new.keys[row, :, :kept] = self.keys[row][:, places]
            new.values[row, :, :kept] = self.values[row][:, places]
            new.origins[row, :kept] = self.origins[row][places]
            new.written[row, :kept] = self.written[row][places]
            new.filled[row], new.cursors[row], new.written_to[row] = kept, kept % capacity, kept
        return new

    def slot_base(self, row: int, kv_head: int) -> int:
        """The slot of place 0 in this row and head."""
        return (row * self.keys.shape[1] + kv_head) * self.capacity

    def origins_of(self, slots: Tensor) -> Tensor:
        """slots (...) -> their origins (..., 3)."""
        slots = slots.to(self.device)
        rows = slots // (self.keys.shape[1] * self.capacity)
        return self.origins.flatten(0, 1)[rows * self.capacity + slots % self.capacity]

    def pairs_of(self, slots: Tensor) -> Tensor:
        """slots (...) -> copies of their keys and values (..., 2, D)."""
        flat = slots.to(self.device).flatten()
        pairs = self.keys.new_empty(flat.numel(), 2, self.keys.shape[-1])
        for copies, table in zip(pairs.unbind(1), (self.keys, self.values), strict=True):
            for start in range(0, len(flat), COPIED_AT_ONCE):
                some = slice(start, start + COPIED_AT_ONCE)
                copies[some] = table.flatten(0, 2).index_select(0, flat[some])
        return pairs.view(*slots.shape, *pairs.shape[1:])

    def close(self) -> None:
        """Remove the files. Tensors that are still in use elsewhere stay readable until they are let go."""
        self._remove_files()


def _fresh_folder(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="knn-memory-", dir=directory))


def _remove_folder(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _map_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=int(np.prod(shape)), dtype=dtype).view(shape)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks the system for zeroed pages, which cost nothing until they are written; torch.zeros touches them all.
    return torch.from_numpy(np.zeros(shape, dtype=_BYTES_AS[dtype.itemsize])).view(dtype)
