"""Where the documents come from: the corpus that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from memorizing_transformers_pytorch.data import enwik8, files
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import Corpus, TextDocument
from memorizing_transformers_pytorch.data.hub import HuggingFaceDataset


class First:
    """The first documents of a corpus."""

    def __init__(self, corpus: Corpus, count: int) -> None:
        self._corpus = corpus
        self._count = count

    def __iter__(self) -> Iterator[TextDocument]:
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
