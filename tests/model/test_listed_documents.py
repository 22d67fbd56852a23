"""A memory lists the documents that it holds: a row that is cleared by what is read lists none of them."""

from __future__ import annotations

import pytest
import torch

from memorizing_transformers_pytorch import KNNMemoryList
from memorizing_transformers_pytorch.model.session import Session
from tests.model.helpers import EOS, SOS, XL, random_tokens, tiny

MARKERS = {"clear_memories_on_sos_token_id": SOS, "clear_memories_on_eos_token_id": EOS}
T = 6


def listed(memories: KNNMemoryList) -> list[str]:
    return [each.title for each in memories.documents()]


def begun(memories: KNNMemoryList, *titles: str, row: int = 0) -> list[int]:
    numbers = [memories.ledger.begin(title, row, 0) for title in titles]
    for number in numbers:
        memories.ledger.grow(number, T)
    return numbers


def origins(*numbers: int) -> torch.Tensor:
    """Of one segment of each row."""
    return torch.tensor(numbers)[:, None, None].expand(len(numbers), T, 3)


@pytest.mark.parametrize("ends_by", ["eos", "sos", "starts"])
def test_a_model_tells_the_list_that_it_was_given_which_rows_it_cleared(ends_by: str) -> None:
    model = tiny(**MARKERS)
    memories = model.create_knn_memories(batch_size=2)
    old, kept = begun(memories, "old"), begun(memories, "kept", row=1)
    model(random_tokens(2, T), memories, origins=origins(*old, *kept))
    assert listed(memories) == ["old", "kept"]
    tokens, starts = random_tokens(2, T), torch.zeros(2, T, dtype=torch.bool)
    if ends_by == "starts":
        starts[0, 2] = True
    else:
        tokens[0, 2] = EOS if ends_by == "eos" else SOS
    new = begun(memories, "new")
    model(tokens, memories, origins=origins(*new, *kept), starts=starts)
    assert listed(memories) == ["kept", "new"]
    assert [len(list(memories.entries(row))) for row in (0, 1)] == [3 if ends_by == "eos" else 4, 2 * T]


def test_nothing_is_listed_of_a_row_that_ends_with_eos_and_what_follows_is() -> None:
    model = tiny(**MARKERS)
    memories, tokens = model.create_knn_memories(batch_size=1), random_tokens(1, T)
    [number] = begun(memories, "a book")
    tokens[0, -1] = EOS
    model(tokens, memories, origins=origins(number))
    assert listed(memories) == []
    model(random_tokens(1, T), memories, origins=origins(number))
    assert listed(memories) == ["a book"]


@pytest.mark.parametrize("grow_first", [True, False])
@pytest.mark.parametrize("variant", [{}, XL], ids=["plain", "xl"])
def test_a_session_lists_the_document_that_it_reads_unless_it_has_ended(variant: dict, grow_first: bool) -> None:
    model = tiny(**MARKERS, **variant)
    memories, length = model.create_knn_memories(batch_size=1), 5 * T
    for title, ends in (("first", False), ("second", True), ("third", False)):
        tokens = random_tokens(1, length)[0]
        if ends:
            tokens[-1] = EOS
        number = memories.ledger.begin(title, 0, 0)
        if grow_first:
            memories.ledger.grow(number, length)
        session = Session(model, memories, batch_size=1, segment_length=T, documents=[number])
        session.read([tokens])
        session.close()
        if not grow_first:
            memories.ledger.grow(number, length)
        assert listed(memories) == ([] if ends else [title])


def test_a_refused_segment_leaves_documents_and_entries_as_they_were() -> None:
    model = tiny(**MARKERS)
    memories = model.create_knn_memories(batch_size=1)
    [number] = begun(memories, "a book")
    model(random_tokens(1, T), memories, origins=origins(number))
    before = memories.state_dict(), memories.documents()
    tokens = random_tokens(1, T)
    tokens[0, 2] = EOS
    with pytest.raises(ValueError, match="expected origins to be a tensor of integers"):
        model(tokens, memories, origins=origins(number).float())
    with pytest.raises(ValueError, match="expected token ids"):
        model(tokens + 1_000, memories)
    assert all(torch.equal(part, before[0][name]) for name, part in memories.state_dict().items())
    assert memories.documents() == before[1]
