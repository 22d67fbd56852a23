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
        self._corpus, self._count = corpus, count

    def __iter__(self) -> Iterator[TextDocument]:
        return islice(self._corpus, self._count)

    def fingerprint(self) -> str:
        return f"{self._count} of {self._corpus.fingerprint()}"


def open_corpus(config: DataConfig, progress: bool = False) -> Corpus:
    """The corpus of `config.source`, downloaded if need be. Raises ValueError for an unknown source."""
    corpus: Corpus
    kind, _, rest = config.source.partition(":")
    if config.source == "stdlib":
        corpus = files.standard_library(config)
    elif kind == "enwik8":
        corpus = enwik8.Enwik8(Path(rest) if rest else enwik8.download_enwik8(config.cache, progress))
    elif kind == "hf":
        corpus = HuggingFaceDataset(config)
    else:
        corpus = files.folder(config) if Path(config.source).is_dir() else files.matching(config)
    return corpus if config.max_documents is None else First(corpus, config.max_documents)
