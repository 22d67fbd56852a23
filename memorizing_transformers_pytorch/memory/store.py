"""Where entries lie: for each row a ring of fixed capacity in which the newest entry replaces the oldest.

A store knows rows and slots. It checks nothing that its caller (`KNNMemory`) has checked, and searches nothing.
All heads of a row fill together, so a row has one ring of places, and each place holds a key and a value per head.
The entries of a row always occupy places 0 ... filled - 1, which is what lets a search read them as one buffer.

Shapes: R rows, G key/value heads, M capacity, N entries added, D head width.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.disk.shards import File, read_tensors, to_bytes
from memorizing_transformers_pytorch.memory.entries import PER_HEAD, Sizes, StagedEntries, Vectors, by_place
from memorizing_transformers_pytorch.memory.index.exact import Ring
from memorizing_transformers_pytorch.memory.lease import Changed, Log

COPIED_AT_ONCE = 4_096  # entries, that stay in cache on their way
_PICKLED = {"sizes", "device", "mapped_from", "filled", "cursors", "written_to", "lives", "_directory"}


def new_life() -> int:
    """A number that no row has had before, in any process; see `Ring.life`."""
    return uuid.uuid4().int


class Store:
    """Entries of R rows in RAM, on a GPU, or (with a directory) in memory-mapped files of its own.

    keys, values: `Vectors` (R, G, C, D). origins: (R, C, 3) int64. C is the room, the capacity unless tables are given.
    filled: entries in each row. cursors: the place in each that is written next. written_to: how many entries each was
    given since it was last empty. log: what changed under the leases on it. lock: held while anything is written, or
    read that must not change meanwhile. Files lie in a fresh folder and are removed by `close`, or at the latest when
    the store is collected.

    tables: to use instead of empty ones, with room for C entries; when that is used up, `resized` gives a larger store.
    mapped_from: the file from which they are mapped, until anything is written to them.
    """

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device,
        directory: Path | None,
        tables: dict[str, Tensor] | None = None,
    ) -> None:
        self.sizes, self.device = sizes, device
        self.mapped_from: tuple[Path, File] | None = None
        self.filled, self.cursors, self.written_to = ([0] * sizes.rows for _ in range(3))
        self.lives = [new_life() for _ in range(sizes.rows)]
        self._left = [0] * sizes.rows  # places of each row that hold what leases may have seen before it was cleared
        self._directory = directory
        self._folder = None if directory is None or tables is not None else _fresh_folder(directory)
        self._use(tables or self._empty_tables())

    def _use(self, tables: dict[str, Tensor]) -> None:
        self.log, self.lock = Log(), threading.RLock()
        self._remove_files = weakref.finalize(self, _remove, self._folder)
        self.tables = tables
        self.keys = Vectors(tables["keys"], tables.get("key_scales"))
        self.values = Vectors(tables["values"], tables.get("value_scales"))
        self.origins = tables["origins"]

    def _empty_tables(self) -> dict[str, Tensor]:
        def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            folder = self._folder
            return _zeros(shape, dtype, self.device) if folder is None else _mapped(folder / name, shape, dtype)

        with torch.inference_mode(False):  # a memory made inside it can be written outside
            return {name: allocate(name, *each) for name, each in self.sizes.tables(self.sizes.capacity).items()}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: entries in RAM by value, those in files by the paths of these."""
        kept = {name: each for name, each in vars(self).items() if name in _PICKLED}
        if self.mapped_from is None and self._folder is None:
            with self.lock:
                places = [torch.arange(filled, device=self.device) for filled in self.filled]
                picked = [self.picked(row, each) for row, each in enumerate(places)]
            # As bytes: tensors would be shared with a process that is spawned, from memory that nobody keeps.
            kept["entries"] = [{name: to_bytes(each) for name, each in tables.items()} for tables in picked]
        return kept | {"folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        entries, folder = state.pop("entries", None), state.pop("folder")
        vars(self).update(state)
        self._folder, self._left = None, [0] * self.sizes.rows
        if self.mapped_from is not None:
            self._use(read_tensors(*self.mapped_from, verify=False))
        elif folder is not None:  # changes here do not reach the files of the other store
            shapes = self.sizes.tables(self.sizes.capacity)
            self._use({name: _mapped(folder / name, *each, shared=False) for name, each in shapes.items()})
        else:
            self._use(self._empty_tables())
            for row, tables in enumerate(entries):
                for name, data in tables.items():
                    places = by_place(name, by_place(name, self.tables[name][row])[: self.filled[row]])
                    places.copy_(torch.from_numpy(data).view(places.dtype).view(places.shape))

    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        """A store of its own with the same entries, whatever becomes of this one."""
        with self.lock:
            return self.resized(self.capacity)

    @property
    def capacity(self) -> int:
        return self.sizes.capacity

    @property
    def room(self) -> int:
        """C: for how many entries of each row there are places."""
        return self.keys.shape[2]

    def has_room_for(self, entries: StagedEntries) -> bool:
        """Whether there are places for them, or are as many as there may be."""
        counts = zip(entries.rows, entries.counts(), strict=True)
        return self.room == self.capacity or all(self.filled[row] + count <= self.room for row, count in counts)

    def write(self, entries: StagedEntries) -> None:
        """Put entries, in order, over the oldest of their rows."""
        for i, row in enumerate(entries.rows):
            chosen = slice(None) if entries.mask is None else entries.mask[i].nonzero().squeeze(-1)
            keys, values = entries.keys[i][:, chosen], entries.values[i][:, chosen]
            tables = {"keys": keys.numbers, "values": values.numbers, "origins": entries.origins[i][chosen]}
            if keys.scales is not None and values.scales is not None:
                tables |= {"key_scales": keys.scales, "value_scales": values.scales}
            self.append(row, tables)

    def append(self, row: int, tables: Mapping[str, Tensor]) -> None:
        """Put entries over the oldest of a row. tables: that row of each table of them, (G, N, ...) or (N, ...)."""
        count = len(tables["origins"])
        cursor = (self.cursors[row] + max(count - self.capacity, 0)) % self.capacity
        start = count - min(count, self.capacity)
        while start < count:  # at most twice: up to the end of the ring, then from its beginning
            run = min(count - start, self.capacity - cursor)
            here, there = slice(cursor, cursor + run), slice(start, start + run)
            self._before_change(row, here)
            for name, table in self.tables.items():
                by_place(name, table[row])[here] = by_place(name, tables[name])[there]
            start, cursor = start + run, (cursor + run) % self.capacity
        self.cursors[row] = cursor
        self.filled[row] = min(self.filled[row] + count, self.capacity)
        self.written_to[row] += count

    def _before_change(self, row: int, places: slice) -> None:
        """Copy what leases may have seen in these places, which are about to change."""
        self.mapped_from = None
        places = slice(places.start, min(places.stop, max(self.filled[row], self._left[row])))
        if not self.log.is_read or places.start >= places.stop:
            return
        numbers = torch.arange(places.start, places.stop, device=self.device)
        slots = torch.stack([self.slot_base(row, head) + numbers for head in range(self.sizes.kv_heads)])
        keys, values = (vectors[row][:, places].clone().flatten(0, 1) for vectors in (self.keys, self.values))
        origins = self.origins[row, places].clone()
        self.log.append(Changed(slots.flatten(), keys, values, row * self.room + numbers, origins))

    def oldest(self, row: int, count: int) -> StagedEntries:
        """Copies of so many entries of a row, the oldest first."""
        places = self.places_in_order(row)[:count]
        keys, values = self.keys[row][None, :, places], self.values[row][None, :, places]
        return StagedEntries([row], keys, values, self.origins[row][None, places], None)

    def clear(self, rows: list[int]) -> None:
        for row in rows:
            self._left[row] = max(self._left[row], self.filled[row]) if self.log.is_read else 0
            self.filled[row] = self.cursors[row] = self.written_to[row] = 0
            self.lives[row] = new_life()

    def ring(self, row: int) -> Ring:
        """The entries of a row as an index sees them."""
        keys = self.keys[row, :, : self.filled[row]]
        return Ring(keys, row, self.cursors[row], self.written_to[row], self.lives[row])

    def empty_like(self, capacity: int | None = None) -> Store:
        """A new store of the same kind, with another capacity if given, in a folder of its own beside this one's."""
        sizes = self.sizes if capacity is None else self.sizes._replace(capacity=capacity)
        return Store(sizes, self.device, self._directory)

    def resized(self, capacity: int) -> Store:
        """A new store with the newest entries of each row. This one stays as it is, and so do its lookups."""
        new = self.empty_like(capacity)
        for row, filled in enumerate(self.filled):
            places = self.places_in_order(row)[max(filled - capacity, 0) :]
            new.append(row, self.picked(row, places))
        return new

    def picked(self, row: int, places: Tensor) -> dict[str, Tensor]:
        """Copies of what these places of a row hold: of each table (G, n, ...) or (n, ...), as `append` takes it."""
        tables = self.tables.items()
        return {name: each[row][:, places] if name in PER_HEAD else each[row][places] for name, each in tables}

    def places_in_order(self, row: int) -> Tensor:
        """The places of a row that hold entries, the oldest first."""
        first = self.cursors[row] - self.filled[row]
        return (first + torch.arange(self.filled[row], device=self.device)) % self.capacity

    def remove(self, row: int, gone: Tensor) -> None:
        """Take out the entries in some places, gone: (N,) bool for those that hold any. The others close up, in order;
        nothing stays behind in the places that are free now."""
        order = self.places_in_order(row)
        order = order[~gone.to(order.device)[order]]
        self._before_change(row, slice(0, self.filled[row]))
        for name, table in self.tables.items():
            places = by_place(name, table[row])
            places[: len(order)] = places[order]
            places[len(order) : self.filled[row]] = 0
        self.filled[row] = self.written_to[row] = len(order)
        self.cursors[row] = len(order) % self.capacity
        self.lives[row] = new_life()

    def numbers_in(self, row: int) -> Tensor:
        """(N,) the document of each entry of a row, by place."""
        return self.origins[row, : self.filled[row], 0]

    def slot_base(self, row: int, kv_head: int) -> int:
        """The slot of place 0 in this row and head."""
        return (row * self.keys.shape[1] + kv_head) * self.room

    def origins_of(self, slots: Tensor) -> Tensor:
        """slots (...) -> their origins (..., 3)."""
        return self.origins.flatten(0, 1)[self.entries_of(slots)]

    def entries_of(self, slots: Tensor) -> Tensor:
        """Slots -> the numbers of their entries: the heads of a row share them."""
        slots = slots.to(self.device)
        return slots // (self.keys.shape[1] * self.room) * self.room + slots % self.room

    def pairs_of(self, slots: Tensor) -> Tensor:
        """slots (...) -> copies of their keys and values (..., 2, D), as floating-point numbers."""
        flat = slots.to(self.device).flatten()
        shape = flat.numel(), 2, self.keys.shape[-1]
        pairs = torch.empty(shape, dtype=self.keys.float_dtype, device=self.device)
        for copies, table in zip(pairs.unbind(1), (self.keys, self.values), strict=True):
            for start in range(0, len(flat), COPIED_AT_ONCE):
                some = slice(start, start + COPIED_AT_ONCE)
                copies[some] = table.flatten(0, 2).at(flat[some]).floats()
        return pairs.view(*slots.shape, *pairs.shape[1:])

    def close(self) -> None:
        """Remove the files. Tensors that are still in use elsewhere stay readable until they are let go."""
        self._remove_files()


def _fresh_folder(directory: Path) -> Path:
    """A new folder in this one. Raises ValueError where none can be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="knn-memory-", dir=directory))
    except OSError as error:
        raise ValueError(f"expected a directory for files, got {str(directory)!r}: {error.strerror}") from error


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, shared: bool = True) -> Tensor:
    """A file as a tensor. shared: whether changes reach the file; it is made if it is not there."""
    return torch.from_file(str(path), shared=shared, size=math.prod(shape), dtype=dtype).view(shape)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks the system for zeroed pages, which cost nothing until they are written; torch.zeros touches them all.
    return torch.from_numpy(np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)).view(dtype)
