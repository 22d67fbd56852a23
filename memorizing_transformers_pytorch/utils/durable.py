"""Files that are whole or not there: written aside, brought to the disk, then renamed; with checksums of folders."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memorizing_transformers_pytorch.utils.plain_json import read_object

CHECKSUMS = "checksums.json"


class SaveError(OSError):
    """A memory or a checkpoint could not be written; what was there before is intact."""


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring the files of a folder (not those of folders in it) and their names to the disk."""
    for path in folder.iterdir():
        if path.is_file():
            sync(path)
    sync(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. At the end that file takes the place of `path`; if anything fails it is
    removed, and `path` is as it was."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.incomplete")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_checksums(folder: Path) -> None:
    """Keep the SHA-256 of every file of a folder in checksums.json, for `verify`."""
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def verify(folder: Path, *names: str) -> None:
    """Raises ValueError unless these files of the folder are as they were when `write_checksums` was called."""
    try:
        sums = read_object(folder / CHECKSUMS)
        for name in names:
            found, expected = _sha256(folder / name), sums[name]
            if found != expected:
                raise ValueError(f"expected SHA-256 {expected} of {name}, got {found}")
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"expected whole files in {str(folder)!r}: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
