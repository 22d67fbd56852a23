"""The stream: each row reads whole documents in order, nothing is lost, nothing is mixed, by one process or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memorizing_transformers_pytorch.data.cache import TokenisedDocuments, build
from memorizing_transformers_pytorch.data.document import TextDocument
from memorizing_transformers_pytorch.data.stream import Batch, DocumentStream
from memorizing_transformers_pytorch.data.tokenizer import ByteTokenizer
from memorizing_transformers_pytorch.model.config import IGNORE_INDEX


def make_documents(lengths: list[int]) -> list[np.ndarray]:
    return [(100 * number + np.arange(length)).astype(np.uint16) for number, length in enumerate(lengths)]


class Case(NamedTuple):
    documents: list[np.ndarray]
    options: dict[str, Any]

    def stream(self, **options: Any) -> DocumentStream:
        return DocumentStream(self.documents, **{**self.options, **options})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 23), min_size=1, max_size=7).filter(lambda found: max(found) > 1))
    return Case(
        make_documents(lengths),
        {
            "rows": draw(st.integers(1, sum(length > 1 for length in lengths))),
            "segment_length": draw(st.integers(1, 40)),
            "seed": draw(st.integers(0, 3)),
            "pack": draw(st.booleans()),
        },
    )


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@given(cases())
def test_each_row_reads_whole_documents_in_order(case: Case) -> None:
    stream, documents = case.stream(), case.documents
    finished: list[int] = []
    reading: list[list[int]] = [[] for _ in range(stream.rows)]
    for _ in range(30):
        batch = next(stream)
        assert not (batch.starts & ~batch.mask).any()
        for row in range(stream.rows):
            for token, starts in zip(
                batch.tokens[row][batch.mask[row]], batch.starts[row][batch.mask[row]], strict=True
            ):
                if starts and reading[row]:
                    finished.append(reading[row][0] // 100)
                    assert reading[row] == documents[finished[-1]].tolist()
                    reading[row] = []
                assert starts == (not reading[row])
                reading[row].append(int(token))
    handed_out = finished + [row[0] // 100 for row in reading]
    counts = [handed_out.count(number) for number, document in enumerate(documents) if len(document) > 1]
    assert max(counts) - min(counts) <= 1


@given(cases())
def test_origins_and_labels_say_what_the_documents_say(case: Case) -> None:
    stream = case.stream()
    for _ in range(20):
        batch = next(stream)
        real = zip(batch.tokens[batch.mask], batch.labels[batch.mask], batch.origins[batch.mask], strict=True)
        for token, label, (number, position, original) in real:
            document = case.documents[number]
            assert token == original == document[position]
            assert label == (document[position + 1] if position + 1 < len(document) else IGNORE_INDEX)
        assert (batch.labels[~batch.mask] == IGNORE_INDEX).all()
        assert not batch.origins[~batch.mask].any()
        assert torch.equal(batch.starts, batch.mask & (batch.origins[..., 1] == 0))


@given(cases())
def test_only_the_end_of_a_document_is_padded_and_nothing_if_packed(case: Case) -> None:
    stream = case.stream()
    for _ in range(20):
        batch = next(stream)
        if case.options["pack"]:
            assert batch.mask.all()
            continue
        for row in range(stream.rows):
            count = int(batch.mask[row].sum())
            assert batch.mask[row, :count].all()
            assert count > 0
            assert len(set(batch.origins[row, :count, 0].tolist())) == 1
            if count < case.options["segment_length"]:
                number, position, _ = batch.origins[row, count - 1]
                assert position == len(case.documents[number]) - 1


def test_several_short_documents_fit_into_one_packed_segment() -> None:
    batch = next(DocumentStream(make_documents([3, 0, 2, 4]), rows=1, segment_length=9, pack=True))
    assert sorted(batch.origins[0, :, 0].tolist()) == [0, 0, 0, 2, 2, 3, 3, 3, 3]
    assert batch.starts.sum() == 3
    assert (batch.labels == IGNORE_INDEX).sum() == 3


def test_labels_are_the_tokens_that_follow_within_the_document() -> None:
    stream = DocumentStream(make_documents([7]), rows=1, segment_length=4)
    first, last = next(stream), next(stream)
    assert first.labels.tolist() == [[1, 2, 3, 4]]
    assert last.tokens.tolist() == [[4, 5, 6, 0]]
    assert last.labels.tolist() == [[5, 6, -100, -100]]
    assert last.mask.tolist() == [[True, True, True, False]]
    assert first.starts.tolist() == [[True, False, False, False]]
    assert not last.starts.any()


@given(cases(), st.integers(0, 30))
def test_it_goes_on_exactly_where_its_state_was_taken(case: Case, before: int) -> None:
    stream, resumed = case.stream(), case.stream()
    for _ in range(before):
        next(stream)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert all(same(next(stream), next(resumed)) for _ in range(10))


@given(cases(), st.data())
def test_processes_read_together_what_one_would(case: Case, data: st.DataObject) -> None:
    rows = case.options["rows"]
    cut = data.draw(st.integers(0, rows - 1), label="cut")
    whole = case.stream()
    parts = [case.stream(only=only) for only in (range(cut), range(cut, rows)) if only]
    assert sum(part.rows for part in parts) == whole.rows
    for _ in range(15):
        batches = [next(part) for part in parts]
        assert same(next(whole), Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True))))
        assert all(part.state_dict() == whole.state_dict() for part in parts)


@given(st.integers(0, 4), st.booleans())
def test_a_state_is_taken_by_any_process_for_all(before: int, pack: bool) -> None:
    case = Case(make_documents([9, 14, 2, 31]), {"rows": 4, "segment_length": 5, "pack": pack})
    first, second, whole = case.stream(only=range(0, 4, 2)), case.stream(only=range(1, 4, 2)), case.stream()
    for _ in range(before):
        next(first)
        next(whole)
    second.load_state_dict(first.state_dict())
    assert torch.equal(next(second).tokens, next(whole).tokens[1::2])


def test_the_state_is_small() -> None:
    stream = DocumentStream(make_documents([5] * 300), rows=2, segment_length=4)
    next(stream)
    assert len(json.dumps(stream.state_dict())) < 200


def test_cached_documents_are_counted_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one", "", "two", "x", "three " * 9]
    cached = [("train", TextDocument(str(number), text)) for number, text in enumerate(texts)]
    folder = build(tmp_path, "print", cached, ByteTokenizer(), {})  # type: ignore[arg-type]
    options: dict[str, Any] = {"rows": 2, "segment_length": 4, "pack": True}
    with monkeypatch.context() as patched:
        patched.setattr(TokenisedDocuments, "__getitem__", None)
        stream = DocumentStream(TokenisedDocuments(folder, "train"), **options)
    plain = DocumentStream([np.frombuffer(text.encode(), np.uint8) for text in texts], **options)
    for _ in range(10):
        assert same(next(stream), next(plain))
        assert json.loads(json.dumps(stream.state_dict())) == plain.state_dict()


def test_batches_are_moved_whole() -> None:
    batch = next(DocumentStream(make_documents([5]), rows=1, segment_length=4))
    assert all(tensor.device.type == "meta" for tensor in batch.to("meta", non_blocking=True))
    assert [tensor.dtype for tensor in batch] == [*2 * [torch.int64], torch.bool, torch.int64, torch.bool]


def test_bad_input_is_refused() -> None:
    documents = make_documents([9, 1, 8, 0])
    with pytest.raises(ValueError, match="expected rows and segment_length of at least 1, got 0 and 5"):
        DocumentStream(documents, rows=0, segment_length=5)
    message = "expected at most 2 rows, one for each document of at least 2 tokens, got 3"
    with pytest.raises(ValueError, match=message):
        DocumentStream(documents, rows=3, segment_length=5)
    for only in (range(0), range(1, 3), range(-1, 1)):
        with pytest.raises(ValueError, match="expected only to hold some of 2 rows, got range"):
            DocumentStream(documents, rows=2, segment_length=5, only=only)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "expected the state of a stream with seed 0, got 1"),
        ({"documents": 3}, "expected the state of a stream with documents 2, got 3"),
        ({"places": [[0, 0]]}, "expected the state of 2 rows, got 1"),
        ({"places": [[0, 0], [2, 0]]}, "expected places within the documents, got position 0 of 2"),
        ({"places": [[0, 10], [1, 0]]}, "expected places within the documents, got position 10 of 0"),
        ({"taken": 3}, "expected at most 2 documents taken of epoch 0, got 3"),
        ({"more": 0}, "expected a state of seed, documents, epoch, taken, places, got .*more"),
    ],
)
def test_the_state_of_another_stream_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    case = Case(make_documents([9, 8]), {"rows": 2, "segment_length": 5})
    stream = case.stream()
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict({**stream.state_dict(), **change})
    assert same(next(stream), next(case.stream()))
