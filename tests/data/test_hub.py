"""Hugging Face datasets: read from disk or streamed, the same documents."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import TextDocument
from memorizing_transformers_pytorch.data.hub import HuggingFaceDataset
from memorizing_transformers_pytorch.data.prepare import open_corpus

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
    expected = [TextDocument(row["title"], row["text"]) for row in ROWS]
    assert list(corpus) == list(corpus) == expected
    first = open_corpus(DataConfig(source=f"hf:{dataset}", name_column="title", streaming=streaming, max_documents=2))
    assert list(first) == expected[:2]


def test_the_fingerprint_changes_with_the_data(dataset: Path) -> None:
    config = DataConfig(source=f"hf:{dataset}")
    before = open_corpus(config).fingerprint()
    assert open_corpus(config).fingerprint() == before
    (dataset / "train.jsonl").write_text(json.dumps(ROWS[0]))
    assert open_corpus(config).fingerprint() != before


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_there_is_refused(dataset: Path, tmp_path: Path, streaming: bool) -> None:
    with pytest.raises(ValueError, match=r"expected a column 'body' in hf:.*, got 'text', 'title'"):
        list(open_corpus(DataConfig(source=f"hf:{dataset}", text_column="body", streaming=streaming)))
    with pytest.raises(ValueError, match=r"expected to read the dataset '.*dataset', got an error: .* split:? \"?dev"):
        list(open_corpus(DataConfig(source=f"hf:{dataset}", hf_split="dev", streaming=streaming)))
    with pytest.raises(ValueError, match=r"expected a dataset, got '.*nowhere'"):
        open_corpus(DataConfig(source=f"hf:{tmp_path}/no/where/nowhere"))


def test_a_hub_out_of_reach_is_one_line(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("Couldn't reach it\nat all")

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    with pytest.raises(ValueError, match=r"expected a dataset, got 'some/where': Couldn't reach it$"):
        open_corpus(DataConfig(source="hf:some/where"))


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_files_are_refused_in_one_line_that_names_the_dataset(dataset: Path, streaming: bool) -> None:
    (dataset / "train.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"expected to read the dataset '.*dataset', got an error: ") as caught:
        list(open_corpus(DataConfig(source=f"hf:{dataset}", streaming=streaming)))
    assert "\n" not in str(caught.value)
    assert "JSON" in str(caught.value)


def test_a_dataset_that_is_a_script_is_refused(dataset: Path) -> None:
    (dataset / "train.jsonl").unlink()
    (dataset / "dataset.py").write_text("")
    with pytest.raises(ValueError, match=r"expected a dataset, got '.*dataset': Dataset scripts are no longer"):
        open_corpus(DataConfig(source=f"hf:{dataset}"))


@pytest.mark.parametrize("error", [ConnectionResetError("cut\noff"), EOFError("cut"), RuntimeError("cut")])
def test_a_stream_that_breaks_is_refused_in_one_line(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def breaking(_: object) -> Iterator[dict[str, str]]:
        yield ROWS[0]
        raise error

    corpus = iter(open_corpus(DataConfig(source=f"hf:{dataset}", streaming=True)))
    monkeypatch.setattr("datasets.IterableDataset.__iter__", breaking)
    assert next(corpus).text == "text 0"
    with pytest.raises(ValueError, match=r"expected to read the dataset '.*dataset', got an error: cut$"):
        next(corpus)


def test_columns_that_are_not_wanted_are_not_read(dataset: Path) -> None:
    corpus = open_corpus(DataConfig(source=f"hf:{dataset}", text_column="title"))
    assert isinstance(corpus, HuggingFaceDataset)
    assert [list(row) for row in corpus._rows()] == [["title"]] * len(ROWS)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_text_are_skipped_and_counted(dataset: Path, streaming: bool) -> None:
    rows = [*ROWS, {"text": None, "title": "none"}]
    (dataset / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"skipped 1 rows of 'hf:.*' whose column 'text' is null"):
        assert len(list(open_corpus(DataConfig(source=f"hf:{dataset}", streaming=streaming)))) == len(ROWS)


def test_a_missing_library_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'memorizing_transformers_pytorch\[datasets\]'"):
        open_corpus(DataConfig(source="hf:anything"))
