"""Corpora: the source decides what is opened, and how much of it is read."""

from __future__ import annotations

from pathlib import Path

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import TextDocument
from memorizing_transformers_pytorch.data.prepare import First, open_corpus


def test_only_the_first_documents_are_read_if_so_told(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    (tmp_path / "d").write_bytes(b"\0")
    corpus = open_corpus(DataConfig(source=str(tmp_path), max_documents=2))
    assert isinstance(corpus, First)
    assert list(corpus) == list(corpus) == [TextDocument("a", "a"), TextDocument("b", "b")]


def test_the_fingerprint_says_how_many(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    configs = [DataConfig(source=str(tmp_path), max_documents=count) for count in (None, 1, 2)]
    assert len({open_corpus(config).fingerprint() for config in configs}) == 3


def test_a_folder_may_be_called_like_a_source(tmp_path: Path) -> None:
    """As `./enwik8` or `./stdlib`."""
    folder = tmp_path / "stdlib"
    folder.mkdir()
    (folder / "a").write_text("text")
    assert list(open_corpus(DataConfig(source=str(folder)))) == [TextDocument("a", "text")]
