"""Writing memories to a folder: as a whole (a base), or what was added since (a journal).

A base has room for an eighth more entries than there are, and journals may take an eighth of its size. When that is
used up, or when it is asked for, the next save writes a new base; so a save costs about what has changed. Who may write
to the folder, and what is left over in it, is also decided here.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import filelock
from torch import Tensor

from memorizing_transformers_pytorch.memory.disk.manifest import (
    FILE_NAME,
    NAME,
    Base,
    Journal,
    Manifest,
    Part,
    Row,
    read_manifest,
    write_manifest,
)
from memorizing_transformers_pytorch.memory.disk.shards import StreamedTensor, write_tensors
from memorizing_transformers_pytorch.memory.entries import PER_HEAD
from memorizing_transformers_pytorch.memory.knn_memory import KNNMemory
from memorizing_transformers_pytorch.memory.ledger import Ledger
from memorizing_transformers_pytorch.memory.store import Store
from memorizing_transformers_pytorch.utils.durable import SaveError, sync
from memorizing_transformers_pytorch.utils.version import __version__

LOCK = ".lock"
SECONDS_TO_WAIT = 10.0
SPARE = 8  # the part of a base that journals may add to it
LEAST_SPARE = 2**20  # bytes that they may add to a small one
MOST_JOURNALS = 64

Mark = tuple[int, int]
"""Of a row at some time: its life and how many entries it had been given, as `Store.lives` and `Store.written_to`."""


@dataclass(frozen=True)
class Marks:
    """What a folder knows of memories in RAM: folder and state, and where each row of each of them stood when its base
    and its last journal were written."""

    folder: Path
    state: str
    base: list[list[Mark]]
    last: list[list[Mark]]


class Belongings(NamedTuple):
    """What is saved with memories: see `Manifest`."""

    ledger: Ledger
    fingerprint: str | None
    extra: dict[str, Any]


def save(
    memories: Sequence[KNNMemory],
    folder: Path,
    belongings: Belongings,
    marks: Marks | None,
    *,
    overwrite: bool,
    compact: bool,
) -> Marks:
    """Make these memories the state of a folder, in one step; see `KNNMemoryList.save`."""
    try:
        if not overwrite:
            refuse_others(folder)
        make_folder(folder)
        with locked(folder):
            old, goes_on = _old_state(folder, marks, overwrite=overwrite)
            try:
                return _save(memories, folder, belongings, None if compact or not goes_on else marks, old)
            finally:
                sweep(folder)
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(f"could not save to {str(folder)!r}, where nothing has changed: {error}") from error


def check_folder(path: str | Path, marks: Marks | None, *, overwrite: bool) -> None:
    """Raises ValueError for a folder to which `save` would not write, as others have."""
    folder = Path(path).resolve()
    if not overwrite:
        refuse_others(folder)
    _old_state(folder, marks, overwrite=overwrite)


def _old_state(folder: Path, marks: Marks | None, *, overwrite: bool) -> tuple[Manifest | None, bool]:
    """What the folder holds, and whether the marks belong to it. Raises ValueError if they do not, unless overwrite."""
    try:
        old = read_manifest(folder)
    except FileNotFoundError:
        return None, False
    except ValueError:
        if overwrite:
            return None, False
        raise
    goes_on = marks is not None and (marks.folder, marks.state) == (folder, old.state)
    if not goes_on and not overwrite:
        raise ValueError(
            f"expected {str(folder)!r} to hold what was saved or loaded here before, got something else: "
            "load that, save elsewhere, or use overwrite=True"
        )
    return old, goes_on


def _save(
    memories: Sequence[KNNMemory], folder: Path, belongings: Belongings, marks: Marks | None, old: Manifest | None
) -> Marks:
    now = [list(zip(memory.store.lives, memory.store.written_to, strict=True)) for memory in memories]
    manifest = None if marks is None or old is None else _with_journal(memories, folder, marks, old)
    base = now if manifest is None or marks is None else marks.base
    if manifest is None:
        bases = tuple(_write_base(memory, folder) for memory in memories)
        manifest = Manifest("", "", None, bases)
    manifest = replace(
        manifest,
        package=__version__,
        saved=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=belongings.fingerprint,
        documents=tuple(belongings.ledger.documents()),
        next_document=belongings.ledger.next_number,
        extra=belongings.extra,
        state=uuid.uuid4().hex,
    )
    sync(folder)  # the names of new files before the manifest that tells of them
    write_manifest(folder, manifest)
    return Marks(folder, manifest.state, base, now)


def _write_base(memory: KNNMemory, folder: Path) -> Base:
    store = memory.store
    most = max(store.filled)
    room = min(most + most // SPARE + 1, store.capacity)
    tables = {
        name: StreamedTensor(dtype, shape, _pieces(store, name, room))
        for name, (shape, dtype) in store.sizes.tables(room).items()
    }
    return Base(
        dim=memory.dim,
        max_memories=memory.max_memories,
        kv_heads=memory.num_kv_heads,
        dtype=str(memory.dtype).removeprefix("torch."),
        index=memory.index,
        policy=memory.policy,
        room=room,
        rows=tuple(Row(*each) for each in zip(store.filled, store.cursors, strict=True)),
        file=write_tensors(folder / f"base-{uuid.uuid4().hex}.safetensors", tables),
    )


def _pieces(store: Store, name: str, room: int) -> Iterator[Tensor]:
    """A table with so much room, piece by piece: places that hold no entry are 0, whatever was there before."""
    for row, filled in enumerate(store.filled):
        table = store.tables[name][row]
        for head in table if name in PER_HEAD else [table]:
            yield head[:filled]
            yield head.new_zeros(room - filled, *head.shape[1:])


def _with_journal(memories: Sequence[KNNMemory], folder: Path, marks: Marks, old: Manifest) -> Manifest | None:
    """The old state with what was added since; None if that does not fit to its base."""
    if len(memories) != len(old.memories):
        return None
    for memory, base in zip(memories, old.memories, strict=True):
        same = memory.store.sizes == base.sizes and (memory.index, memory.policy) == (base.index, base.policy)
        if not same or max(memory.store.filled) > base.room:
            return None
    is_full = len(old.journals) >= MOST_JOURNALS
    kept = () if is_full else old.journals
    parts = _parts(memories, marks.base if is_full else marks.last)
    if not parts:
        return replace(old, journals=kept)
    tables = _journal_tables(memories, parts)
    size = sum(journal.file.bytes for journal in kept) + sum(table.num_bytes for table in tables.values())
    if size > max(sum(base.file.bytes for base in old.memories) // SPARE, LEAST_SPARE):
        return None
    file = write_tensors(folder / f"journal-{uuid.uuid4().hex}.safetensors", tables)
    return replace(old, journals=(*kept, Journal(parts, file)))


def _parts(memories: Sequence[KNNMemory], since: list[list[Mark]]) -> tuple[Part, ...]:
    """What has become of the rows."""
    parts = []
    for i, memory in enumerate(memories):
        store = memory.store
        for row, (life, written) in enumerate(since[i]):
            restart = store.lives[row] != life
            count = store.filled[row] if restart else min(store.written_to[row] - written, store.filled[row])
            if restart or count:
                parts.append(Part(i, row, count, restart))
    return tuple(parts)


def _journal_tables(memories: Sequence[KNNMemory], parts: tuple[Part, ...]) -> dict[str, StreamedTensor]:
    """The newest entries of rows, the oldest first."""
    tables = {}
    for part in parts:
        store = memories[part.memory].store
        places = store.places_in_order(part.row)[store.filled[part.row] - part.count :]
        for name, entries in store.picked(part.row, places).items():
            tables[f"{part.memory}.{part.row}.{name}"] = StreamedTensor(entries.dtype, tuple(entries.shape), [entries])
    return tables


def refuse_others(folder: Path) -> None:
    """Raises ValueError for a folder that holds no memory, but something else than a first save leaves that was broken
    off: it is for something else."""
    if not folder.is_dir() or (folder / NAME).exists():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not _is_of_a_save(path.name))
    if others:
        raise ValueError(
            f"expected a new folder, an empty one or that of a memory, got {str(folder)!r} with {others[0]!r}"
            f"{f' and {len(others) - 1} more' if len(others) > 1 else ''}"
        )


def _is_of_a_save(name: str) -> bool:
    unfinished = name.startswith(f".{NAME}.") and name.endswith(".incomplete")
    return unfinished or FILE_NAME.fullmatch(name) is not None


def make_folder(folder: Path) -> None:
    """Make it and those above it, so that they last."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


@contextmanager
def locked(folder: Path, seconds: float = SECONDS_TO_WAIT) -> Iterator[None]:
    """Inside, no other process or thread writes here (one may go in several times). The system frees the lock of a
    process that has ended.

    Raises SaveError if somebody else is writing for longer than so many seconds, or the folder cannot be written.
    """
    lock = filelock.FileLock(folder / LOCK, is_singleton=True)
    try:
        lock.acquire(timeout=seconds)
    except filelock.Timeout:
        raise SaveError(
            f"the memory in {str(folder)!r} is locked by another process; "
            f"wait, or remove {LOCK} if that process has died"
        ) from None
    except OSError as error:
        raise SaveError(f"cannot write to the folder {str(folder)!r}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Remove files that the state of the folder does not need, and those that were not finished."""
    try:
        kept = {file.name for file in read_manifest(folder).files()}
    except FileNotFoundError:
        kept = set()
    except (OSError, ValueError):
        return  # somebody may want to mend it
    for path in folder.iterdir():
        if _is_of_a_save(path.name) and path.name not in kept:
            with suppress(OSError):  # it takes room, but does no harm
                path.unlink()
