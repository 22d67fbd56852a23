"""Tokenised documents on disk: written once, memory-mapped ever after, so that a corpus need not fit into memory.

A folder holds for each split the tokens one after the other (.tokens), where each document begins (.offsets.npy), its
size as UTF-8 (.bytes.npy) and its name (.names), besides tokenizer.json and meta.json. It is written aside and renamed
when all of it is on the disk: it is whole, or not there. Several processes may build it at once; the first one's stays.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np

from memorizing_transformers_pytorch.data.document import SPLITS, Document, Split
from memorizing_transformers_pytorch.data.text import text_bytes
from memorizing_transformers_pytorch.data.tokenizer import Tokenizer

FORMAT = 1
_ASIDE = ".building-"
_STALE_SECONDS = 3600.0
_CHARACTERS_AT_ONCE = 1 << 20
_DOCUMENTS_AT_ONCE = 256


class TokenisedDocuments(Sequence[np.ndarray]):
    """The documents of one split: token ids that are read from disk as they are used.

    Raises ValueError if the folder is damaged.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self._offsets = np.asarray(np.load(folder / f"{split}.offsets.npy", mmap_mode="r"))
            self.num_bytes: np.ndarray = np.load(folder / f"{split}.bytes.npy")
            with (folder / f"{split}.names").open(encoding="utf-8") as lines:
                self.names: list[str] = [json.loads(line) for line in lines]
            dtype = np.dtype(meta["dtype"])
            size = (folder / f"{split}.tokens").stat().st_size
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"expected tokenised documents, got a damaged {str(folder)!r}: {error}") from error
        found = size / dtype.itemsize, len(self.names), len(self.num_bytes)
        expected = int(self._offsets[-1]), len(self), len(self)
        if found != expected:
            what = f"{expected} tokens, names and sizes of {split}"
            raise ValueError(f"expected {what} in {str(folder)!r}, got {found}; delete it")
        tokens = np.memmap(folder / f"{split}.tokens", dtype, mode="r") if size else np.empty(0, dtype)
        self._tokens = np.asarray(tokens)  # the same mapping, but slices of the plain class are made faster

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, number: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, number: slice) -> list[np.ndarray]: ...
    def __getitem__(self, number: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"expected a document below {len(self)}, got {number}")
        number %= len(self)
        return self._tokens[self._offsets[number] : self._offsets[number + 1]]

    @property
    def num_tokens_total(self) -> int:
        return len(self._tokens)

    @property
    def total_bytes(self) -> int:
        return int(self.num_bytes.sum())


def build(
    cache: Path,
    fingerprint: str,
    documents: Iterable[tuple[Split, Document]],
    tokenizer: Tokenizer,
    about: dict[str, Any],
) -> Path:
    """The folder of that fingerprint: as it is there, or written from the documents. about: kept in meta.json."""
    folder = cache / fingerprint
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache)
    aside = cache / f"{_ASIDE}{fingerprint}-{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        _write(aside, documents, tokenizer, about)
        _sync(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
        _sync(cache)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _remove_stale(cache: Path) -> None:
    """What builders that were killed left behind. A living one writes all the time."""
    for aside in cache.glob(f"{_ASIDE}*"):
        times = [path.stat().st_mtime for path in (aside, *aside.glob("*")) if path.exists()]
        if times and max(times) < time.time() - _STALE_SECONDS:
            shutil.rmtree(aside, ignore_errors=True)


def _write(
    aside: Path, documents: Iterable[tuple[Split, Document]], tokenizer: Tokenizer, about: dict[str, Any]
) -> None:
    dtype = np.dtype("<u2" if tokenizer.num_tokens <= 1 << 16 else "<u4")
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_writer(aside, split)) for split in SPLITS}
        for some in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for _, document in some])
            for (split, document), tokens in zip(some, encoded, strict=True):
                writers[split].add(document, np.asarray(tokens, dtype=dtype))
    tokenizer.save(aside / "tokenizer.json")
    meta = {**about, "dtype": dtype.str, "num_tokens": tokenizer.num_tokens}
    (aside / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _batches(documents: Iterable[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    some: list[tuple[Split, Document]] = []
    characters = 0
    for split, document in documents:
        some.append((split, document))
        characters += len(document.text)
        if characters >= _CHARACTERS_AT_ONCE or len(some) == _DOCUMENTS_AT_ONCE:
            yield some
            some, characters = [], 0
    if some:
        yield some


class _Writer:
    """Appends documents to the files of a split; keeps in memory two numbers for each."""

    def __init__(self, tokens: Any, names: Any) -> None:
        self._tokens, self._names = tokens, names
        self.offsets, self.num_bytes = array("q", [0]), array("q")

    def add(self, document: Document, tokens: np.ndarray) -> None:
        self._tokens.write(tokens.tobytes())
        self._names.write(json.dumps(document.name) + "\n")
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.num_bytes.append(len(text_bytes(document.text)))


@contextmanager
def _writer(aside: Path, split: Split) -> Iterator[_Writer]:
    names = (aside / f"{split}.names").open("w", encoding="utf-8")
    with (aside / f"{split}.tokens").open("wb") as tokens, names:
        writer = _Writer(tokens, names)
        yield writer
    np.save(aside / f"{split}.offsets.npy", np.asarray(writer.offsets, dtype=np.int64))
    np.save(aside / f"{split}.bytes.npy", np.asarray(writer.num_bytes, dtype=np.int64))


def _sync(folder: Path) -> None:
    for path in (*(file for file in folder.iterdir() if file.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
