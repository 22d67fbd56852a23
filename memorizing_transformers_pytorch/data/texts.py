"""Text files as a user names them: which files there are below a folder, and what text is in one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from memorizing_transformers_pytorch.memory.disk.manifest import files_of_memory


class NoText(ValueError):
    """A file without any text to read: binary, empty, not UTF-8, or without tokens."""


def files_below(sources: Sequence[str], pattern: str, *, may_be_none: bool = False) -> list[Path]:
    """The given files, and those below the given folders that match the pattern, each once. Hidden files and files of
    a memory are left out; a folder that cannot be opened is listed itself.

    Raises ValueError for sources that do not exist, and if there are no files, unless there may be none.
    """
    found: dict[str, Path] = {}
    for source in map(Path, sources):
        if not source.is_dir() and not source.is_file():
            raise ValueError(f"there is no file or folder {str(source)!r} to read")
        for path in _below(source, pattern) if source.is_dir() else [source]:
            found.setdefault(real_path(path), path)
    if not found and not may_be_none:
        raise ValueError(f"no files match {pattern!r} in {', '.join(sources)}")
    return list(found.values())


def real_path(file: Path | str) -> str:
    """Where a file is, the same for every spelling of its name."""
    try:
        return os.path.realpath(file)
    except (OSError, ValueError):  # the name of a document that is no file
        return str(file)


def _below(root: Path, pattern: str) -> Iterator[Path]:
    closed: list[Path] = []
    for place, folders, names in os.walk(root, onerror=lambda error: closed.append(Path(error.filename))):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        for name in sorted(set(names) - files_of_memory(Path(place), names)):
            path = Path(place, name)
            if not name.startswith(".") and path.match(pattern) and path.is_file():
                yield path
    yield from closed


def text_of(data: bytes, name: str) -> str:
    """The text of a file. Raises NoText if it is binary, empty or not UTF-8."""
    if b"\0" in data:
        raise NoText(f"{name}: binary file")
    try:
        text = data.decode("utf-8").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    except UnicodeDecodeError as error:
        raise NoText(f"{name}: not UTF-8, byte 0x{data[error.start]:02x} at offset {error.start:,}") from error
    if not text.strip():
        raise NoText(f"{name}: empty file")
    return text
