"""Documents: where the text comes from, and which of it is held out."""

from __future__ import annotations

import hashlib
import sysconfig
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Tests, tables and generated text of the standard library; and what others installed into it.
_NOT_LIBRARY = (
    "test",
    "tests",
    "idlelib",
    "encodings",
    "lib2to3",
    "pydoc_data",
    "turtledemo",
    "site-packages",
    "__pycache__",
)

ENWIK8_BYTES = 100_000_000
ENWIK8_SPLIT = {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, 100_000_000)}


class Document(NamedTuple):
    """A text that belongs together, read from its beginning to its end."""

    name: str
    text: str


def standard_library(folder: str | Path | None = None) -> list[Document]:
    """Python's own source, which is on every machine: a document for each top-level module or package, by name.

    folder: another folder laid out like it. Raises ValueError if there is no Python file in it.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in _NOT_LIBRARY for part in parts):
            texts.setdefault(parts[0], []).append(path.read_text(encoding="utf-8", errors="replace"))
    if not texts:
        raise ValueError(f"expected Python files in {str(root)!r}, got none")
    return [Document(name, "\n\n".join(parts)) for name, parts in sorted(texts.items())]


def split_by_name(documents: Iterable[Document], held_out: float = 0.1) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: each falls to one side by a hash of its name, whatever else there is."""
    train: list[Document] = []
    valid: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(document.name.encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        (valid if share < held_out else train).append(document)
    return train, valid


def read_enwik8(path: str | Path) -> dict[str, np.ndarray]:
    """The usual split of enwik8 (mattmahoney.net/dc/enwik8.zip), as bytes: 90M to train, 5M to validate, 5M to test.

    path: the file of 100,000,000 bytes, or the zip archive that holds it. Raises ValueError for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected enwik8 or enwik8.zip, got {str(path)!r}, which does not exist")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if "enwik8" not in archive.namelist():
                raise ValueError(f"expected 'enwik8' in {str(path)!r}, got {archive.namelist()[:5]}")
            data = archive.read("enwik8")
    else:
        data = path.read_bytes()
    if len(data) != ENWIK8_BYTES:
        raise ValueError(f"expected {ENWIK8_BYTES:,} bytes of enwik8 in {str(path)!r}, got {len(data):,}")
    everything = np.frombuffer(data, dtype=np.uint8)
    return {name: everything[start:stop] for name, (start, stop) in ENWIK8_SPLIT.items()}
