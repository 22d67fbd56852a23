"""What a folder says of the memory in it: manifest.json, and whether that can be true.

A manifest names the files that make up the memory, so that a new one makes a new state of it at once.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dacite
import torch

from memorizing_transformers_pytorch.memory.checks import STORAGE_DTYPES, check_options
from memorizing_transformers_pytorch.memory.disk.shards import File
from memorizing_transformers_pytorch.memory.entries import Sizes
from memorizing_transformers_pytorch.memory.ledger import Document
from memorizing_transformers_pytorch.memory.policy import POLICIES
from memorizing_transformers_pytorch.utils.durable import replacing
from memorizing_transformers_pytorch.utils.plain_json import read_object

NAME = "manifest.json"
FORMAT, VERSION = "memorizing-transformers-pytorch memory", 1
FILE_NAME = re.compile(r"(base|journal)-[0-9a-f]{32}\.safetensors")
REMOVED_POLICY = "least-attended"  # in memories that older versions wrote
MOST_BYTES = 2**28  # of a manifest
MOST_NUMBERS = 2**48  # in a table
MOST_COUNTED = 2**60  # tokens, documents, additions: far below what int64 can hold
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES}


@dataclass(frozen=True)
class Row:
    """Of a ring: how many entries it holds, and the place that is written next."""

    filled: int
    cursor: int


@dataclass(frozen=True)
class Base:
    """The memory of a layer when its file was written. room: C, places of each row in the file."""

    dim: int
    max_memories: int
    kv_heads: int
    dtype: str
    index: str
    policy: str
    room: int
    rows: tuple[Row, ...]
    file: File

    @property
    def sizes(self) -> Sizes:
        return Sizes(len(self.rows), self.kv_heads, self.max_memories, self.dim, DTYPES[self.dtype])


@dataclass(frozen=True)
class Part:
    """What a journal adds to a row of a memory: so many entries; restart: after it was emptied."""

    memory: int
    row: int
    count: int
    restart: bool


@dataclass(frozen=True)
class Journal:
    """A file with what was added between two saves."""

    parts: tuple[Part, ...]
    file: File


@dataclass(frozen=True)
class Manifest:
    """A memory on disk.

    state: a name that no other state has. saved: when (ISO 8601, UTC), by which package version. fingerprint: of the
    weights that wrote the memory, if known. next_document: the number that the next document gets. extra: whatever else
    belongs to it, for those who use it.
    """

    package: str
    saved: str
    fingerprint: str | None
    memories: tuple[Base, ...]
    journals: tuple[Journal, ...] = ()
    documents: tuple[Document, ...] = ()
    next_document: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    state: str = field(default_factory=lambda: uuid.uuid4().hex)

    def files(self) -> Iterator[File]:
        """All that the memory consists of beside the manifest."""
        yield from (base.file for base in self.memories)
        yield from (journal.file for journal in self.journals)

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.files())


def files_of_memory(folder: Path, names: Iterable[str]) -> set[str]:
    """Which of these names of files in a folder belong to a memory in it, of any version, damaged or not."""
    try:
        with (folder / NAME).open("rb") as file:
            is_there = FORMAT.encode() in file.read(len(FORMAT) + 100)
    except OSError:
        is_there = False
    return {name for name in names if is_there and (name == NAME or FILE_NAME.fullmatch(name))}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make this the state of the folder. Raises OSError if it cannot be written, and ValueError for what could not be
    read again; the old state is then intact."""
    text = _readable_text(manifest)
    with replacing(folder / NAME) as aside:
        aside.write_bytes(text)


def _readable_text(manifest: Manifest) -> bytes:
    try:
        body = json.loads(json.dumps(asdict(manifest), allow_nan=False))  # so that names of fields are text
        whole = {"format": FORMAT, "version": VERSION, "sha256": checksum_of(body), "memory": body}
        text = json.dumps(whole, indent=1, allow_nan=False).encode()
        if len(text) > MOST_BYTES:
            raise ValueError(f"{len(text):,} bytes of manifest, and at most {MOST_BYTES:,} are read")
        _parsed(json.loads(text))
    except (ValueError, TypeError, RecursionError, dacite.DaciteError) as error:
        raise ValueError(f"expected documents and extra that can be read again, got {error}") from error
    return text


def read_manifest(folder: Path) -> Manifest:
    """The state of a folder. Raises FileNotFoundError where there is none, and ValueError for one that is damaged,
    foreign, newer, or cannot be."""
    path = folder / NAME
    if path.is_dir():
        raise ValueError(f"expected the manifest of a memory in {str(path)!r}, got a folder")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"expected a manifest of at most {MOST_BYTES:,} bytes, got {size:,} in {str(path)!r}")
    try:
        return _parsed(read_object(path))
    except (ValueError, TypeError, dacite.DaciteError) as error:
        raise ValueError(f"expected the manifest of a memory in {str(path)!r}: {error}") from error


def _parsed(whole: dict[str, Any]) -> Manifest:
    if whole.get("format") != FORMAT:
        raise ValueError(f"expected the format {FORMAT!r}, got another")
    if whole.get("version") != VERSION:
        raise ValueError(f"expected version {VERSION} of the format, got {whole.get('version')!r}")
    body = whole.get("memory")
    if not isinstance(body, dict) or checksum_of(body) != whole.get("sha256"):
        raise ValueError("expected what its SHA-256 tells, got something else: it was changed")
    bases = body.get("memories")
    for base in bases if isinstance(bases, list) else []:
        if isinstance(base, dict):
            base.pop("clock", None)  # older versions wrote one; ignored
    manifest = dacite.from_dict(Manifest, body, dacite.Config(strict=True, cast=[tuple]))
    for base in manifest.memories:
        _check_base(base)
    _check_journals(manifest)
    _check_documents(manifest)
    names = [file.name for file in manifest.files()]
    if len(set(names)) != len(names) or not all(FILE_NAME.fullmatch(name) for name in names):
        raise ValueError(f"expected different files with names such as base-<32 digits>.safetensors, got {names}")
    return manifest


def _check_base(base: Base) -> None:
    sizes = {"dim": base.dim, "max_memories": base.max_memories, "kv_heads": base.kv_heads, "rows": len(base.rows)}
    if base.dtype not in DTYPES or base.policy not in (*POLICIES, REMOVED_POLICY):
        known = f"a dtype of {sorted(DTYPES)} and a policy of {POLICIES}"
        raise ValueError(f"expected {known}, got {base.dtype!r} and {base.policy!r}")
    check_options(sizes, DTYPES[base.dtype], torch.device("cpu"), base.index, mapped=True)
    if not 0 <= base.room <= base.max_memories:
        raise ValueError(f"expected room for 0 to {base.max_memories} entries, got {base.room}")
    if len(base.rows) * base.kv_heads * base.max_memories * base.dim > MOST_NUMBERS:
        raise ValueError(f"expected at most {MOST_NUMBERS} numbers in a memory, got sizes {sizes}")
    for row in base.rows:
        turning = row.filled == base.max_memories
        if not 0 <= row.filled <= base.room or not (0 <= row.cursor < row.filled if turning else True):
            raise ValueError(f"expected rows of at most {base.room} entries in turn, got {row}")
        if not turning and row.cursor != row.filled:
            raise ValueError(f"expected the next entry after the last of a row that is not full, got {row}")


def _check_journals(manifest: Manifest) -> None:
    for part in (part for journal in manifest.journals for part in journal.parts):
        if not 0 <= part.memory < len(manifest.memories):
            raise ValueError(f"expected memories 0 to {len(manifest.memories) - 1} in a journal, got {part}")
        base = manifest.memories[part.memory]
        if not 0 <= part.row < len(base.rows) or not 0 <= part.count <= base.max_memories:
            raise ValueError(f"expected rows and entries that {part.memory} can have in a journal, got {part}")


def _check_documents(manifest: Manifest) -> None:
    rows = max((len(base.rows) for base in manifest.memories), default=0)
    numbers = [each.number for each in manifest.documents]
    distinct = len(set(numbers)) == len(numbers) and manifest.next_document < MOST_COUNTED
    if not distinct or not all(0 <= number < manifest.next_document for number in numbers):
        raise ValueError(f"expected different documents below number {manifest.next_document}, got {numbers[:100]}")
    for each in manifest.documents:
        if not 0 <= each.row < rows or not 0 <= each.tokens < MOST_COUNTED or not 0 <= each.start < MOST_COUNTED:
            raise ValueError(f"expected documents in rows 0 to {rows - 1}, got {each}")


def checksum_of(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
