"""The stream: each row reads whole documents in order, nothing is lost, nothing is mixed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memorizing_transformers_pytorch.data.stream import Batch, DocumentStream


def make_documents(lengths: list[int]) -> list[np.ndarray]:
    return [100 * number + np.arange(length) for number, length in enumerate(lengths)]


lengths = st.lists(st.integers(0, 23), min_size=1, max_size=6).filter(lambda found: max(found) > 1)


@given(lengths, st.integers(1, 4), st.integers(1, 9), st.integers(0, 3))
def test_each_row_reads_whole_documents_in_order(lengths: list[int], rows: int, segment: int, seed: int) -> None:
    documents = make_documents(lengths)
    stream = DocumentStream(documents, rows=rows, segment_length=segment, seed=seed)
    reading: list[list[int]] = [[] for _ in range(rows)]
    finished: list[int] = []
    for _ in range(40):
        batch = next(stream)
        for row in range(rows):
            if row in batch.starts and reading[row]:
                finished.append(reading[row][0] // 100)
                assert reading[row] == documents[finished[-1]].tolist()
                reading[row] = []
            assert reading[row] or row in batch.starts
            real = batch.mask[row]
            reading[row] += batch.tokens[row][real].tolist()
            assert (batch.origins[row][real][:, 0] == reading[row][0] // 100).all()
            assert batch.origins[row][real][:, 1].tolist() == [
                token % 100 for token in batch.tokens[row][real].tolist()
            ]
            assert torch.equal(batch.origins[row][real][:, 2], batch.tokens[row][real])
    handed_out = finished + [row[0] // 100 for row in reading]
    counts = [handed_out.count(number) for number, length in enumerate(lengths) if length > 1]
    assert max(counts) - min(counts) <= 1


def test_labels_are_the_tokens_that_follow_within_the_document() -> None:
    stream = DocumentStream(make_documents([7]), rows=1, segment_length=4)
    first, last = next(stream), next(stream)
    assert first.labels.tolist() == [[1, 2, 3, 4]]
    assert last.tokens.tolist() == [[4, 5, 6, 0]]
    assert last.labels.tolist() == [[5, 6, -100, -100]]
    assert last.mask.tolist() == [[True, True, True, False]]


def same(left: Batch, right: Batch) -> bool:
    return left.starts == right.starts and all(torch.equal(a, b) for a, b in zip(left[:4], right[:4], strict=True))


@given(st.integers(0, 30))
def test_it_goes_on_exactly_where_its_state_was_taken(before: int) -> None:
    documents = make_documents([9, 14, 2, 31])
    stream = DocumentStream(documents, rows=3, segment_length=5)
    for _ in range(before):
        next(stream)
    resumed = DocumentStream(documents, rows=3, segment_length=5)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert all(same(next(stream), next(resumed)) for _ in range(20))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="expected rows and segment_length of at least 1, got 0 and 5"):
        DocumentStream(make_documents([9]), rows=0, segment_length=5)
    with pytest.raises(ValueError, match="expected a document of at least 2 tokens"):
        DocumentStream(make_documents([1, 0]), rows=1, segment_length=5)
    one, two = (DocumentStream(make_documents([9]), rows=rows, segment_length=5) for rows in (1, 2))
    with pytest.raises(ValueError, match="expected the state of 2 rows, got 1"):
        two.load_state_dict(one.state_dict())
