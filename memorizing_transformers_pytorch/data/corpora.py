"""Where the documents come from: the corpus that a configuration names."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from memorizing_transformers_pytorch.data import enwik8, files
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import Corpus, Document
from memorizing_transformers_pytorch.data.hub import HuggingFaceDataset


class First:
    """The first documents of a corpus."""

    def __init__(self, corpus: Corpus, count: int) -> None:
        self._corpus = corpus
        self._count = count

    def __iter__(self) -> Iterator[Document]:
        return islice(self._corpus, self._count)

    def fingerprint(self) -> str:
        return f"{self._count} of {self._corpus.fingerprint()}"


def open_corpus(config: DataConfig, progress: bool = False) -> Corpus:
    """The corpus of `config.source`; what has to be downloaded is. Raises ValueError for anything that is none."""
    corpus = _corpus(config, progress)
    return corpus if config.max_documents is None else First(corpus, config.max_documents)


def _corpus(config: DataConfig, progress: bool) -> Corpus:
    kind, _, rest = config.source.partition(":")
    if config.source == "stdlib":
        return files.standard_library(config)
    if config.source == "enwik8":
        return enwik8.Enwik8(enwik8.download_enwik8(config.cache, progress))
    if kind == "enwik8":
        return enwik8.Enwik8(Path(rest))
    if kind == "hf":
        return HuggingFaceDataset(config)
    return files.folder(config) if Path(config.source).is_dir() else files.matching(config)


# TEMPORARY, for train.py
ENWIK8_BYTES = 100_000_000
ENWIK8_SPLIT = {"train": (0, 90_000_000), "valid": (90_000_000, 95_000_000), "test": (95_000_000, 100_000_000)}


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
