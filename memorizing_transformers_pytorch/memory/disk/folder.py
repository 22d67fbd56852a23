"""The folder in which a memory lies: who may write, and what is left over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from memorizing_transformers_pytorch.memory.disk.manifest import FILE_NAME, NAME, read_manifest
from memorizing_transformers_pytorch.utils.durable import SaveError, sync

LOCK = ".lock"
SECONDS_TO_WAIT = 10.0


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
