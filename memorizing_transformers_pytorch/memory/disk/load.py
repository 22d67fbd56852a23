"""Reading memories from a folder, and whether they are what was saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.checks import NonFiniteError
from memorizing_transformers_pytorch.memory.disk.manifest import (
    NAME,
    REMOVED_POLICY,
    Base,
    Journal,
    Manifest,
    read_manifest,
)
from memorizing_transformers_pytorch.memory.disk.save import Mark, Marks
from memorizing_transformers_pytorch.memory.disk.shards import read_tensors
from memorizing_transformers_pytorch.memory.entries import by_place
from memorizing_transformers_pytorch.memory.index.structure import is_removed
from memorizing_transformers_pytorch.memory.knn_memory import KNNMemory
from memorizing_transformers_pytorch.memory.moving import memory_with
from memorizing_transformers_pytorch.memory.policy import OLDEST
from memorizing_transformers_pytorch.memory.store import Store

ATTEMPTS = 5  # to read a state that others replace meanwhile
LOST = -1  # a life that no row has


class How(NamedTuple):
    """mmap: leave entries in the files until they are used. verify: compare checksums and look for NaN. device,
    directory: of the memories, as for `KNNMemory`."""

    mmap: bool = False
    verify: bool = True
    device: torch.device = torch.device("cpu")
    directory: Path | None = None


class Loaded(NamedTuple):
    """What a folder holds; see `Manifest` for the rest of it."""

    memories: list[KNNMemory]
    manifest: Manifest
    marks: Marks


def load(folder: Path, how: How) -> Loaded:
    """The state of a folder; see `KNNMemoryList.load`."""
    if how.mmap and how.device.type != "cpu":
        raise ValueError(f"expected device 'cpu' for a memory-mapped memory, got {str(how.device)!r}")
    manifest = state_of(folder)
    for attempt in range(ATTEMPTS):
        try:
            return _load(folder, manifest, how)
        except FileNotFoundError as error:
            before, manifest = manifest, state_of(folder)
            if manifest.state == before.state or attempt == ATTEMPTS - 1:
                raise ValueError(f"expected all files of the memory in {str(folder)!r}, got {error}") from error
    raise AssertionError


def state_of(folder: Path) -> Manifest:
    """As `read_manifest`. Raises ValueError also where there is none."""
    try:
        return read_manifest(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"expected the folder of a memory, got {str(folder)!r}, which has no {NAME}") from None


def _load(folder: Path, manifest: Manifest, how: How) -> Loaded:
    stores = [_store_of(base, folder, how) for base in manifest.memories]
    base_marks: list[list[Mark]] = [list(zip(store.lives, store.written_to, strict=True)) for store in stores]
    for journal in manifest.journals:
        _replay(stores, journal, read_tensors(folder, journal.file, verify=how.verify), how)
        for part in journal.parts:
            if part.restart:
                base_marks[part.memory][part.row] = LOST, 0
    known = zip(stores, map(_still_known, manifest.memories), strict=True)
    memories = [memory_with(store, *index_and_policy) for store, index_and_policy in known]
    last: list[list[Mark]] = [list(zip(store.lives, store.written_to, strict=True)) for store in stores]
    return Loaded(memories, manifest, Marks(folder, manifest.state, base_marks, last))


def _still_known(base: Base) -> tuple[str, str]:
    """Index and policy; with a warning, others in place of those that older versions had."""
    index, policy = base.index, base.policy
    if policy == REMOVED_POLICY:
        policy = OLDEST
        warnings.warn(f"the policy {base.policy!r} was removed; this memory uses {policy!r} from now on", stacklevel=2)
    if is_removed(index):
        index = "auto"
        warnings.warn(f"the index {base.index!r} was removed; this memory uses {index!r} from now on", stacklevel=2)
    return index, policy


def _tables_of(base: Base, folder: Path, how: How) -> dict[str, Tensor]:
    """The tables in the file of a base. Raises ValueError for others than it tells of."""
    tables = read_tensors(folder, base.file, verify=how.verify)
    expected = base.sizes.tables(base.room)
    got = {name: (tuple(table.shape), table.dtype) for name, table in tables.items()}
    if got != expected:
        raise ValueError(f"expected tables {expected} in {base.file.name}, got {got}")
    if how.verify:
        for row, state in enumerate(base.rows):
            _check_entries(
                {name: by_place(name, table[row])[: state.filled] for name, table in tables.items()}, base.file.name
            )
    return tables


def _check_entries(tables: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError for entries that no memory holds."""
    for name, table in tables.items():
        if table.is_floating_point() and not bool(table.isfinite().all()):
            raise NonFiniteError(f"expected finite {name} in {where}, got NaN or infinity")


def _store_of(base: Base, folder: Path, how: How) -> Store:
    tables = _tables_of(base, folder, how)
    if how.mmap:
        store = Store(base.sizes, how.device, how.directory, tables)
        store.mapped_from = folder, base.file
    else:
        try:
            store = Store(base.sizes, how.device, how.directory)
        except (MemoryError, RuntimeError, ValueError) as error:
            raise ValueError(f"expected a memory that fits here, got {base.sizes}: {error}") from error
        for row, state in enumerate(base.rows):
            for name, table in store.tables.items():
                by_place(name, table[row])[: state.filled] = by_place(name, tables[name][row])[: state.filled]
    store.filled = [row.filled for row in base.rows]
    store.cursors = [row.cursor for row in base.rows]
    store.written_to = list(store.filled)
    return store


def _replay(stores: list[Store], journal: Journal, tables: Mapping[str, Tensor], how: How) -> None:
    """Do once more what a journal tells. Raises ValueError for one that cannot be."""
    left, where = dict(tables), journal.file.name
    for part in journal.parts:
        store = stores[part.memory]
        entries = {}
        for name, (shape, dtype) in store.sizes.tables(part.count).items():
            table = left.pop(f"{part.memory}.{part.row}.{name}", None)
            if table is None or (tuple(table.shape), table.dtype) != (shape[1:], dtype):
                raise ValueError(f"expected {name} {shape[1:]} as {dtype} of {part} in {where}, got something else")
            entries[name] = table.to(store.device)
        if how.verify:
            _check_entries(entries, where)
        if part.restart:
            store.clear([part.row])
        if store.room < store.capacity and store.filled[part.row] + part.count > store.room:
            raise ValueError(f"expected rows of at most {store.room} entries, got more by {part} in {where}")
        store.append(part.row, entries)
    if left:
        raise ValueError(f"expected nothing else in {where}, got {sorted(left)[:10]}")


def check_fingerprint(found: str | None, expected: str | None) -> None:
    """Raises ValueError for a memory that other weights have written, where both are known."""
    if None not in (found, expected) and found != expected:
        raise ValueError(f"expected a memory written by weights with the fingerprint {expected}, got {found}")
