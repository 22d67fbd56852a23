"""Files of text: a document for each, for each entry of a folder, or for each row of a table."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Set
from dataclasses import replace
from glob import glob, has_magic
from itertools import groupby
from pathlib import Path

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import TextDocument, decode
from memorizing_transformers_pytorch.data.tables import is_table, read_table, without_nulls

# Tests, tables and generated text of the standard library; and what others installed into it.
_NOT_LIBRARY = {
    "test", "tests", "idlelib", "encodings", "lib2to3", "pydoc_data", "turtledemo", "site-packages", "dist-packages",
    "__pycache__",
}  # fmt: skip


class Files:
    """The documents of files below a folder, in the order of their paths; names are paths relative to it."""

    def __init__(self, root: Path, paths: list[Path], config: DataConfig) -> None:
        self._root, self._paths, self._config = root, paths, config

    def __iter__(self) -> Iterator[TextDocument]:
        return without_nulls(self._documents(), self._config)

    def _documents(self) -> Iterator[TextDocument | None]:
        if self._config.group == "folder":
            for entry, members in groupby(self._paths, lambda path: path.relative_to(self._root).parts[0]):
                yield TextDocument(entry, "\n\n".join(self._read(path) for path in members))
            return
        for path in self._paths:
            if is_table(path):
                yield from read_table(path, self._config)
            else:
                yield TextDocument(path.relative_to(self._root).as_posix(), self._read(path))

    def fingerprint(self) -> str:
        """Path, size and time of change of every file."""
        found = ((path.resolve(), path.stat()) for path in self._paths)
        return "\n".join(f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in found)

    def _read(self, path: Path) -> str:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"expected a readable file, got {str(path)!r}: {error.strerror}") from error
        if b"\0" in data:
            raise ValueError(f"expected text, got the binary file {str(path)!r}; a narrower pattern leaves it out")
        return decode(data, str(path), self._config.errors)


def standard_library(config: DataConfig) -> Files:
    """Python's own source, which is on every machine: a document for each top-level module or package."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return Files(root, _below(root, "*.py", _NOT_LIBRARY), replace(config, group="folder"))


def folder(config: DataConfig) -> Files:
    """The files below a folder that match the pattern, except hidden ones. Raises ValueError if there are none."""
    root = Path(config.source)
    paths = _below(root, config.pattern, set())
    if not paths:
        raise ValueError(f"expected files that match {config.pattern!r} in {config.source!r}, got none")
    return Files(root, paths, config)


def matching(config: DataConfig) -> Files:
    """The file with that name, or the files that match a glob. Raises ValueError if there are none."""
    source = Path(config.source)
    if source.is_file():
        return Files(source.parent, [source], config)
    paths = sorted(path for path in map(Path, glob(config.source, recursive=True)) if path.is_file())
    if not paths:
        known = "stdlib, enwik8, hf:NAME or an existing path"
        raise ValueError(f"expected a source that is {known}, got {config.source!r}")
    return Files(next(part for part in source.parents if not has_magic(str(part))), paths, config)


def _below(root: Path, pattern: str, skipped: Set[str]) -> list[Path]:
    """Files whose path ends like the pattern, sorted; hidden and skipped folders are not entered."""
    paths: list[Path] = []
    for place, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        paths += [Path(place, name) for name in names if not name.startswith(".") and name not in skipped]
    return sorted(path for path in paths if path.relative_to(root).match(pattern) and path.is_file())


def _refuse(error: OSError) -> None:
    raise ValueError(f"expected a readable folder, got {str(error.filename)!r}: {error.strerror}") from error
