"""Hugging Face datasets: read from disk or streamed, the same documents."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.corpora import open_corpus
from memorizing_transformers_pytorch.data.document import Document

ROWS = [{"text": f"text {number}", "title": f"title {number}"} for number in range(7)]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_each_row_is_a_document_as_often_as_asked(dataset: Path, streaming: bool) -> None:
    corpus = open_corpus(DataConfig(source=f"hf:{dataset}", name_column="title", streaming=streaming))
    expected = [Document(row["title"], row["text"]) for row in ROWS]
    assert list(corpus) == list(corpus) == expected
    first = open_corpus(DataConfig(source=f"hf:{dataset}", name_column="title", streaming=streaming, max_documents=2))
    assert list(first) == expected[:2]


def test_the_fingerprint_changes_with_the_data(dataset: Path) -> None:
    config = DataConfig(source=f"hf:{dataset}")
    before = open_corpus(config).fingerprint()
    assert open_corpus(config).fingerprint() == before
    (dataset / "train.jsonl").write_text(json.dumps(ROWS[0]))
    assert open_corpus(config).fingerprint() != before


def test_what_is_not_there_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a column 'body' in hf:.*, row 0, got 'text', 'title'"):
        list(open_corpus(DataConfig(source=f"hf:{dataset}", text_column="body")))
    with pytest.raises(ValueError, match=r"Unknown split \"dev\""):
        list(open_corpus(DataConfig(source=f"hf:{dataset}", hf_split="dev")))
    with pytest.raises(ValueError, match=r"expected a dataset, got '.*nowhere'"):
        open_corpus(DataConfig(source=f"hf:{tmp_path}/no/where/nowhere"))


def test_a_hub_out_of_reach_is_one_line(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("Couldn't reach it\nat all")

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    with pytest.raises(ValueError, match=r"expected a dataset, got 'some/where': Couldn't reach it$"):
        open_corpus(DataConfig(source="hf:some/where"))


def test_a_missing_library_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'memorizing_transformers_pytorch\[datasets\]'"):
        open_corpus(DataConfig(source="hf:anything"))
