"""Where entries lie: for each row a ring of fixed capacity in which the newest entry replaces the oldest.

A store knows rows and slots. It checks nothing that its caller (`KNNMemory`) has checked, and searches nothing.
All heads of a row fill together, so a row has one ring of places, and each place holds a key and a value per head.
The entries of a row always occupy places 0 ... filled - 1, which is what lets a search read them as one buffer.

Shapes: R rows, G key/value heads, M capacity, N entries added, D head width.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.disk.shards import File
from memorizing_transformers_pytorch.memory.files import fresh_folder, map_file, remove_folder, zeros
from memorizing_transformers_pytorch.memory.index.exact import Ring
from memorizing_transformers_pytorch.memory.retrieved import Lookup
from memorizing_transformers_pytorch.memory.vectors import Vectors

ORIGIN_FIELDS = 3  # document id, position in the document, token id
POSITION = 1  # which of them
UNKNOWN = -1
COPIED_AT_ONCE = 4_096  # entries, that stay in cache on their way
PER_HEAD = {"keys", "values", "key_scales", "value_scales"}  # tables (R, G, C, ...); the others are (R, C, ...)

_lives = itertools.count(1)  # see `Ring.life`


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
        """The same entries, so many of each row at a time."""
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


class Store:
    """Entries of R rows in RAM, on a GPU, or (with a directory) in memory-mapped files of its own.

    keys, values: `Vectors` (R, G, C, D). origins: (R, C, 3) int64. C is the room, the capacity unless `tables`
    are given. filled: entries in each row. cursors: the place in each that is written next. written_to: how many
    entries each was given since it was last empty. readers: lookups that must not lose what they have found. Files lie
    in a fresh folder and are removed by `close`, or at the latest when the store is collected. mapped_from: the folder
    and file that `tables` are mapped from, if they are.

    tables: to use instead of empty ones, with room for C entries; when that is used up, `resized` gives a larger store.
    """

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device,
        directory: Path | None,
        tables: dict[str, Tensor] | None = None,
    ) -> None:
        self.sizes = sizes
        self.filled = [0] * sizes.rows
        self.readers: weakref.WeakSet[Lookup] = weakref.WeakSet()
        self.cursors = [0] * sizes.rows
        self.written_to = [0] * sizes.rows
        self.lives = [next(_lives) for _ in range(sizes.rows)]
        self.mapped_from: tuple[Path, File] | None = None
        self._directory = directory
        folder = None if directory is None or tables is not None else fresh_folder(directory)
        self._remove_files = weakref.finalize(self, remove_folder, folder)

        def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            # Outside inference mode, so that a memory made inside it can still be written outside.
            with torch.inference_mode(False):
                return zeros(shape, dtype, device) if folder is None else map_file(folder / name, shape, dtype)

        if tables is None:
            tables = {name: allocate(name, *each) for name, each in sizes.tables(sizes.capacity).items()}
        self.tables = tables
        self.keys = Vectors(tables["keys"], tables.get("key_scales"))
        self.values = Vectors(tables["values"], tables.get("value_scales"))
        self.origins = tables["origins"]

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

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def write(self, entries: StagedEntries) -> None:
        """Put entries, in order, over the oldest of their rows."""
        for i, row in enumerate(entries.rows):
            chosen = slice(None) if entries.mask is None else entries.mask[i].nonzero().squeeze(-1)
            keys, values = entries.keys[i][:, chosen], entries.values[i][:, chosen]
            self._write_row(row, keys, values, entries.origins[i][chosen])

    def _write_row(self, row: int, keys: Vectors, values: Vectors, origins: Tensor) -> None:
        count = len(origins)
        tables = {"keys": keys.numbers, "values": values.numbers, "origins": origins}
        if keys.scales is not None and values.scales is not None:
            tables |= {"key_scales": keys.scales, "value_scales": values.scales}
        self.append(row, tables, count)

    def append(self, row: int, tables: Mapping[str, Tensor], count: int) -> None:
        """Put so many entries over the oldest of a row. tables: the same row of each table of them, (G, N, ...) or
        (N, ...)."""
        cursor = (self.cursors[row] + max(count - self.capacity, 0)) % self.capacity
        start = count - min(count, self.capacity)
        while start < count:  # at most twice: up to the end of the ring, then from its beginning
            run = min(count - start, self.capacity - cursor)
            here, there = slice(cursor, cursor + run), slice(start, start + run)
            for reader in self.readers:
                reader.keep(row, here)
            for name, table in self.tables.items():
                by_place(name, table[row])[here] = by_place(name, tables[name])[there]
            start, cursor = start + run, (cursor + run) % self.capacity
        self.cursors[row] = cursor
        self.filled[row] = min(self.filled[row] + count, self.capacity)
        self.written_to[row] += count

    def oldest(self, row: int, count: int) -> StagedEntries:
        """Copies of so many entries of a row, the oldest first."""
        places = self.places_in_order(row)[:count]
        keys, values = self.keys[row][None, :, places], self.values[row][None, :, places]
        return StagedEntries([row], keys, values, self.origins[row][None, places], None)

    def clear(self, rows: list[int]) -> None:
        for row in rows:
            self.filled[row] = self.cursors[row] = self.written_to[row] = 0
            self.lives[row] = next(_lives)

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
            new.append(row, self.picked(row, places), len(places))
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
        for reader in self.readers:
            reader.keep(row, slice(0, self.filled[row]))
        for name, table in self.tables.items():
            places = by_place(name, table[row])
            places[: len(order)] = places[order]
            places[len(order) : self.filled[row]] = 0
        self.filled[row] = self.written_to[row] = len(order)
        self.cursors[row] = len(order) % self.capacity
        self.lives[row] = next(_lives)

    def slot_base(self, row: int, kv_head: int) -> int:
        """The slot of place 0 in this row and head."""
        return (row * self.keys.shape[1] + kv_head) * self.room

    def origins_of(self, slots: Tensor) -> Tensor:
        """slots (...) -> their origins (..., 3)."""
        slots = slots.to(self.device)
        entries = slots // (self.keys.shape[1] * self.room) * self.room + slots % self.room  # heads of a row share them
        return self.origins.flatten(0, 1)[entries]

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
