"""Tokenised documents on disk: written once, then memory-mapped, so that a corpus need not fit into memory.

A folder holds for each split the tokens one after the other (.tokens), where each document begins (.offsets.npy), its
size as UTF-8 (.bytes.npy) and its name (.names), besides tokenizer.json and meta.json. It is written under another name
and renamed when it is complete on the disk. Several processes may build it at once; the first one wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from memorizing_transformers_pytorch.data.document import SPLITS, Split, TextDocument, text_bytes
from memorizing_transformers_pytorch.data.tokenizer import Tokenizer
from memorizing_transformers_pytorch.utils.durable import sync, sync_folder
from memorizing_transformers_pytorch.utils.plain_json import parse_json, read_object

FORMAT = 2
_DTYPES = ("<u2", "<u4")  # of tokens
_ASIDE = ".building-"
_STALE_SECONDS = 14 * 24 * 3600.0  # no builder takes that long
_CHARACTERS_AT_ONCE = 1 << 20
_DOCUMENTS_AT_ONCE = 256


class TokenisedDocuments(Sequence[np.ndarray]):
    """The documents of one split: token ids that are read from disk as they are used, and so are names and sizes.

    content: a hash of all tokens and names. Raises ValueError if the folder is damaged.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        try:
            meta = read_object(folder / "meta.json")
            self._offsets = np.asarray(_numbers(folder / f"{split}.offsets.npy"))
            self.num_bytes = _numbers(folder / f"{split}.bytes.npy")
            self._names = folder / f"{split}.names"
            dtype = np.dtype(_DTYPES[_DTYPES.index(meta["dtype"])])
            size = (folder / f"{split}.tokens").stat().st_size
            found = size / dtype.itemsize, self._names.stat().st_size, len(self.num_bytes)
            expected = int(self._offsets[-1]), meta["splits"][split]["names_size"], len(self)
            self.content = str(meta["splits"][split]["content"])
            if self._offsets[0] != 0 or bool((self.lengths < 0).any()):
                raise ValueError("its documents overlap")
            if bool((self.num_bytes < 0).any()) or self.num_bytes.sum(dtype=np.float64) >= 2**63:
                raise ValueError("its documents have impossible sizes")
        except (LookupError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"expected tokenised documents, got a damaged {str(folder)!r}: {error}") from error
        if found != expected:
            what = f"{expected} tokens, bytes of names and sizes of {split}"
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

    @cached_property
    def names(self) -> list[str]:
        """That of each. Raises ValueError if there are others than one for each."""
        with self._names.open("rb") as lines:
            names = [parse_json(line, repr(str(self._names))) for line in lines]
        if len(names) != len(self) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected {len(self)} names in {str(self._names)!r}, got {len(names)} values")
        return names

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each has."""
        return np.diff(self._offsets)

    @property
    def num_tokens_total(self) -> int:
        return len(self._tokens)

    @property
    def total_bytes(self) -> int:
        return int(self.num_bytes.sum())


def _numbers(path: Path) -> np.ndarray:
    """Numbers one after the other, memory-mapped. Raises ValueError for anything else."""
    try:
        numbers: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy reads what is before them as Python, and raises whatever comes of that
        raise ValueError(f"expected an array in {path.name}, got an error: {error}") from error
    if numbers.dtype != np.int64 or numbers.ndim != 1:
        raise ValueError(f"expected numbers (n,) in {path.name}, got {numbers.dtype} {numbers.shape}")
    return numbers


def build(
    cache: Path,
    fingerprint: str,
    documents: Iterable[tuple[Split, TextDocument]],
    tokenizer: Tokenizer,
    about: dict[str, Any],
) -> Path:
    """The folder with that fingerprint, written from the documents unless it exists. about: goes into meta.json."""
    folder = cache / fingerprint
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache)
    aside = cache / f"{_ASIDE}{fingerprint}-{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        _write(aside, documents, tokenizer, about)
        sync_folder(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
        sync(cache)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _remove_stale(cache: Path) -> None:
    """Remove what killed builders left behind."""
    for aside in cache.glob(f"{_ASIDE}*"):
        with contextlib.suppress(FileNotFoundError):  # its builder may be just done
            if aside.stat().st_mtime < time.time() - _STALE_SECONDS:
                shutil.rmtree(aside, ignore_errors=True)


def _write(
    aside: Path, documents: Iterable[tuple[Split, TextDocument]], tokenizer: Tokenizer, about: dict[str, Any]
) -> None:
    dtype = np.dtype(_DTYPES[tokenizer.num_tokens > 1 << 16])
    with ExitStack() as stack:
        writers = {split: _Writer(aside, split, stack) for split in SPLITS}
        for some in _batches(documents):
            encoded = tokenizer.encode_arrays([document.text for _, document in some])
            for (split, document), tokens in zip(some, encoded, strict=True):
                writers[split].add(document, tokens.astype(dtype))
        splits = {split: writer.finish() for split, writer in writers.items()}
    tokenizer.save(aside / "tokenizer.json")
    meta = {**about, "dtype": dtype.str, "num_tokens": tokenizer.num_tokens, "splits": splits}
    (aside / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _batches(documents: Iterable[tuple[Split, TextDocument]]) -> Iterator[list[tuple[Split, TextDocument]]]:
    some: list[tuple[Split, TextDocument]] = []
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

    def __init__(self, aside: Path, split: Split, stack: ExitStack) -> None:
        self._tokens, self._names = (
            stack.enter_context((aside / f"{split}.{name}").open("wb")) for name in ("tokens", "names")
        )
        self._path, self._content = aside / split, hashlib.sha256()
        self._offsets, self._num_bytes = array("q", [0]), array("q")

    def add(self, document: TextDocument, tokens: np.ndarray) -> None:
        name = json.dumps(document.name).encode() + b"\n"
        self._tokens.write(tokens.data)
        self._names.write(name)
        for part in (name, len(tokens).to_bytes(8, "little"), tokens.data):
            self._content.update(part)
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._num_bytes.append(len(text_bytes(document.text)))

    def finish(self) -> dict[str, Any]:
        """Write the numbers; what meta.json says of the split."""
        for name, numbers in (("offsets", self._offsets), ("bytes", self._num_bytes)):
            np.save(f"{self._path}.{name}.npy", np.asarray(numbers, dtype=np.int64))
        return {"content": self._content.hexdigest(), "names_size": self._names.tell()}
