"""What is read, how it is split and which tokens it becomes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


def default_cache() -> Path:
    """The folder for what can be made again: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memorizing_transformers_pytorch"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on. Raises ValueError for bad values."""

    source: str = "stdlib"
    """stdlib (Python's own source), enwik8 (downloaded), enwik8:PATH (the file or its zip), a folder, a file or a glob
    (text files are a document each; .jsonl, .jsonl.gz and .parquet one for each row), or hf:NAME (Hugging Face)."""
    pattern: str = "*"
    """Which files of a folder are read, such as *.md. Hidden ones never are."""
    group: Literal["file", "folder"] = "file"
    """Which files form a document: each file alone, or all files below each entry of the folder (a package, a book)."""
    errors: Literal["replace", "strict"] = "replace"
    """What to do with bytes that are not UTF-8: replace them by U+FFFD, or refuse the file."""

    text_column: str = "text"
    """The column of .jsonl, .parquet and hf: that holds the text."""
    name_column: str | None = None
    """The column that names a document. Without one its name is a hash of its text."""
    nulls: Literal["skip", "fail"] = "skip"
    """What to do with rows whose text is null: skip them, with a warning that says how many, or fail."""
    subset: str | None = None
    """The configuration of an hf: dataset that has several."""
    hf_split: str = "train"
    """The split of an hf: dataset to read; it is split again by valid and test."""
    streaming: bool = False
    """Read an hf: dataset over the network as it is needed, without keeping it on disk."""
    max_documents: int | None = None
    """Read only the first documents, this many."""

    valid: float = 0.05
    """Share of the documents held out to watch the training. enwik8 has a split of its own."""
    test: float = 0.1
    """Share of the documents held out for the final numbers."""
    near_duplicates: float | None = 0.8
    """Jaccard similarity from which documents are near-identical and stay on one side; None: not checked."""

    tokenizer: str = "bpe"
    """bytes, bpe (trained on the training split) or the path of a tokenizer.json."""
    pack: bool = False
    """Fill the segment that ends a document with the next document, instead of padding."""
    cache: Path = field(default_factory=default_cache)
    """The folder for downloads and tokenised text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", Path(self.cache))
        for name in ("source", "pattern", "text_column", "hf_split", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(f"expected {name} not to be empty, got ''")
        if self.source in ("hf:", "enwik8:"):
            raise ValueError(f"expected a name or path after {self.source!r}, got nothing")
        choices = {"group": ("file", "folder"), "errors": ("replace", "strict"), "nulls": ("skip", "fail")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("subset", "streaming"):
            if getattr(self, name) and not self.source.startswith("hf:"):
                raise ValueError(f"expected {name} only with a source of hf:NAME, got source {self.source!r}")
        if not (0 <= self.valid < 1 and 0 <= self.test < 1 and self.valid + self.test < 1):
            raise ValueError(f"expected valid and test from 0, below 1 together, got {self.valid} and {self.test}")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ValueError(f"expected near_duplicates above 0, at most 1, got {self.near_duplicates}")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"expected max_documents of at least 1, got {self.max_documents}")
