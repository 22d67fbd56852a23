"""Documents begin with SOS and end with EOS, rows are uneven, and padding does not exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.model.state import XLMemories
from tests.amounts import some
from tests.model.helpers import (
    EOS,
    EVERYTHING,
    NUM_TOKENS,
    SOS,
    Call,
    assert_same_entries,
    call,
    contents,
    entries,
    origins_of,
    random_tokens,
    tiny,
    variants,
)

MARKERS = {"clear_memories_on_sos_token_id": SOS, "clear_memories_on_eos_token_id": EOS}
T = 7


def twins(**changes: Any) -> tuple[MemorizingTransformer, MemorizingTransformer]:
    """A model that minds the markers, and one with the same weights to which they are ordinary tokens."""
    models = []
    for markers in (MARKERS, {}):
        torch.manual_seed(1)
        models.append(tiny(**changes, **markers))
    return models[0], models[1]


def real_tokens(state: XLMemories, row: int) -> list[int]:
    real = torch.ones_like(state.origins[row, :, 0], dtype=torch.bool) if state.mask is None else state.mask[row]
    return state.origins[row, real, 2].tolist()


# Markers


@pytest.mark.parametrize("place", [0, 3, T - 1])
@variants
def test_a_row_with_sos_is_read_as_if_there_was_nothing_before(variant: dict[str, Any], place: int) -> None:
    model, plain = twins(**variant)
    before, tokens = random_tokens(3, T), random_tokens(3, T)
    tokens[1, place] = SOS
    memories, plain_memories = (model.create_knn_memories(batch_size=3) for _ in range(2))
    state = call(model, before, memories).state
    logits = call(model, tokens, memories, state).result
    went_on = call(plain, tokens, plain_memories, call(plain, before, plain_memories).state).result
    torch.testing.assert_close(logits[[0, 2]], went_on[[0, 2]])
    torch.testing.assert_close(logits[1], call(plain, tokens).result[1])
    assert not torch.allclose(logits[1], went_on[1], atol=1e-4)


@pytest.mark.parametrize("place", [0, 3, T - 1])
@variants
def test_a_row_with_eos_is_read_to_its_end_and_then_forgotten(variant: dict[str, Any], place: int) -> None:
    model, plain = twins(**variant)
    before, tokens, after = random_tokens(3, 3, T)
    tokens[1, place] = EOS
    memories, plain_memories = (model.create_knn_memories(batch_size=3) for _ in range(2))
    logits, state = call(model, tokens, memories, call(model, before, memories).state)
    went_on, plain_state = call(plain, tokens, plain_memories, call(plain, before, plain_memories).state)
    torch.testing.assert_close(logits, went_on)

    logits, went_on = call(model, after, memories, state).result, call(plain, after, plain_memories, plain_state).result
    torch.testing.assert_close(logits[[0, 2]], went_on[[0, 2]])
    assert not torch.allclose(logits[1], went_on[1], atol=1e-4)


@variants
def test_after_eos_at_the_end_of_a_segment_the_next_is_read_as_the_first(variant: dict[str, Any]) -> None:
    model, _ = twins(**variant)
    tokens, after = random_tokens(2, 2, T)
    tokens[1, -1] = EOS
    memories = model.create_knn_memories(batch_size=2)
    state = call(model, tokens, memories).state
    logits = call(model, after, memories, state).result
    torch.testing.assert_close(logits[1], call(model, after).result[1])


@pytest.mark.parametrize(
    ("markers", "survive_from"),
    [
        ({3: SOS}, 3),
        ({3: EOS}, 4),
        ({0: SOS}, 0),
        ({0: EOS}, 1),
        ({6: SOS}, 6),
        ({6: EOS}, 7),
        ({1: SOS, 4: SOS}, 4),
        ({1: EOS, 4: EOS}, 5),
        ({2: EOS, 3: SOS}, 3),
        ({2: SOS, 5: EOS}, 6),
        ({5: SOS, 2: EOS}, 5),
    ],
    ids=str,
)
def test_of_a_segment_with_markers_only_the_last_document_survives(markers: dict[int, int], survive_from: int) -> None:
    model, _ = twins()
    before, tokens = random_tokens(2, T), random_tokens(2, T)
    for place, marker in markers.items():
        tokens[0, place] = marker
    memories = model.create_knn_memories(batch_size=2)
    model(before, memories)
    model(tokens, memories)
    assert entries(memories[0], 0).origins[:, 2].tolist() == tokens[0, survive_from:].tolist()
    assert entries(memories[0], 1).origins[:, 2].tolist() == [*before[1].tolist(), *tokens[1].tolist()]


def test_state_of_a_row_is_cleared_with_its_memory() -> None:
    model, _ = twins(**EVERYTHING)
    before, tokens = random_tokens(3, T), random_tokens(3, T)
    tokens[0, 4], tokens[1, 5] = SOS, EOS
    state = call(model, tokens, None, call(model, before).state).state
    assert [real_tokens(state, row) for row in range(3)] == [
        tokens[0, 4:].tolist(),
        tokens[1, 6:].tolist(),
        tokens[2, 2:].tolist(),
    ]
    assert [bool(state.conv_states[0][row, 0].any()) for row in range(3)] == [True, False, True]


def test_convolution_state_is_empty_where_the_document_ended_with_the_segment() -> None:
    model, _ = twins(short_conv=4)
    tokens = random_tokens(2, T)
    tokens[0, -1] = EOS
    state = call(model, tokens).state
    assert not state.conv_states[0][0].any()
    assert state.conv_states[0][1].all()


def test_reading_only_clears_nothing_but_sos_rows_find_nothing() -> None:
    model, plain = twins(memorizing_layers=(1, 2))
    memories = model.create_knn_memories(batch_size=3)
    model(random_tokens(3, T), memories)
    before, tokens = contents(memories), random_tokens(3, T)
    tokens[0, 4], tokens[1, 2] = SOS, EOS
    logits = model(tokens, memories, add_knn_memory=False)
    for memory, rows in zip(memories, before, strict=True):
        for row in range(3):
            assert_same_entries(entries(memory, row), rows[row])
    torch.testing.assert_close(logits[0], plain(tokens)[0])
    torch.testing.assert_close(logits[1:], plain(tokens, memories, add_knn_memory=False)[1:])


def test_masked_markers_are_no_markers() -> None:
    model, _ = twins()
    tokens, mask = random_tokens(2, T), torch.ones(2, T, dtype=torch.bool)
    memories = model.create_knn_memories(batch_size=2)
    model(tokens, memories)
    tokens[0, 3], tokens[1, 5], mask[0, 3], mask[1, 5] = SOS, EOS, False, False
    model(tokens, memories, mask=mask)
    assert memories[0].num_entries == (2 * T - 1, 2 * T - 1)


def test_one_token_may_be_both_markers() -> None:
    model = tiny(clear_memories_on_sos_token_id=SOS, clear_memories_on_eos_token_id=SOS)
    tokens, memories = random_tokens(1, T), model.create_knn_memories(batch_size=1)
    model(tokens, memories)
    tokens[0, 2] = SOS
    model(tokens, memories)
    assert entries(memories[0], 0).origins[:, 2].tolist() == tokens[0, 3:].tolist()


def remembered(read: list[tuple[int, int]], kept_by_xl: int, capacity: int) -> list[tuple[int, int]]:
    """The slow, obvious version: (position, token) pairs in the memory of a row, read token by token."""
    document: list[tuple[int, int]] = []
    for position, token in read:
        if token in (SOS, EOS):
            document = []
        if token != EOS:
            document.append((position, token))
    return document[: max(len(document) - kept_by_xl, 0)][-capacity:]


@settings(deadline=None, max_examples=some(25, 500))
@given(data=st.data())
@pytest.mark.parametrize("variant", [{}, EVERYTHING], ids=["plain", "everything"])
def test_memory_equals_a_list_read_token_by_token(variant: dict[str, Any], data: st.DataObject) -> None:
    model, rows, capacity = tiny(**variant, **MARKERS, max_knn_memories=6), 2, 6
    memories, state = model.create_knn_memories(batch_size=rows), None
    read: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    position = 0
    for _ in range(data.draw(st.integers(1, 4), label="segments")):
        length = data.draw(st.integers(1, 6), label="length")
        likely_ordinary = st.sampled_from((SOS, EOS, 5, 6, 7, 8, 9, 10))
        texts = st.lists(st.lists(likely_ordinary, min_size=length, max_size=length), min_size=rows, max_size=rows)
        tokens = torch.tensor(data.draw(texts, label="tokens"))
        masks = st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows)
        mask = torch.tensor(data.draw(masks, label="mask"))
        state = call(model, tokens, memories, state, mask=mask, origins=origins_of(tokens, position)).state
        for row in range(rows):
            read[row] += [(position + i, int(tokens[row, i])) for i in range(length) if mask[row, i]]
        position += length
    for number, memory in zip(model.config.layers_with_memory, memories, strict=True):
        kept_by_xl = model.config.xl_max_memories if number in model.config.layers_with_xl else 0
        for row in range(rows):
            expected = remembered(read[row], kept_by_xl, capacity)
            stored = entries(memory, row)
            assert list(zip(stored.positions, stored.tokens, strict=True)) == expected


# Padding


class Document:
    """The reference: one row read alone, with no padding anywhere."""

    def __init__(self, model: MemorizingTransformer) -> None:
        self.model = model
        self.memories = model.create_knn_memories(batch_size=1)
        self.state: XLMemories | None = None

    def read(self, tokens: Tensor, labels: Tensor, origins: Tensor) -> tuple[Tensor, float]:
        """tokens, labels (n,), origins (n, 3) -> logits (n, num_tokens) and the sum of losses."""
        if len(tokens) == 0:
            return torch.empty(0, NUM_TOKENS, dtype=torch.float64), 0.0
        mask = torch.ones(1, len(tokens), dtype=torch.bool)
        logits, self.state = call(self.model, tokens[None], self.memories, self.state, mask=mask, origins=origins[None])
        return logits[0], F.cross_entropy(logits[0], labels, reduction="sum").item()


def check_padded(model: MemorizingTransformer, segments: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """segments: tokens, which of them are real, and the mask to be passed (None to leave it to pad_id)."""
    rows = len(segments[0][0])
    memories, state = model.create_knn_memories(batch_size=rows), None
    alone = [Document(model) for _ in range(rows)]
    for number, (tokens, real, mask) in enumerate(segments):
        labels, origins = random_tokens(*tokens.shape), origins_of(tokens, 10 * number)
        arguments = {"mask": mask, "origins": origins}
        loss = call(model, tokens, memories, state, labels, add_knn_memory=False, **arguments).result
        logits, state = call(model, tokens, memories, state, **arguments)
        total = 0.0
        for row in range(rows):
            at = real[row]
            expected, sum_of_losses = alone[row].read(tokens[row, at], labels[row, at], origins[row, at])
            torch.testing.assert_close(logits[row, at], expected, rtol=0, atol=1e-6)
            total += sum_of_losses
            for memory, own in zip(memories, alone[row].memories, strict=True):
                assert_same_entries(entries(memory, row), entries(own, 0), tolerance=1e-6)
        assert loss.item() == pytest.approx(total / max(int(real.sum()), 1), abs=1e-5)


def trailing(counts: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(counts)[:, None]


@variants
def test_padding_anywhere_changes_nothing(variant: dict[str, Any]) -> None:
    """Left, right, in holes, whole rows, in some segments and not in others; what lies under the mask is arbitrary."""
    model, segments = tiny(**variant, **MARKERS), []
    masks = [
        trailing([T, 3, 0], T),
        trailing([5, T, T], T).flip(-1),
        torch.rand(3, T) < 0.5,
        torch.rand(3, T) < 0.7,
        torch.ones(3, T, dtype=torch.bool),
        torch.zeros(3, T, dtype=torch.bool),
        torch.rand(3, T) < 0.6,
    ]
    for mask in masks:
        tokens = random_tokens(3, T)
        tokens[~mask] = torch.tensor([0, SOS, EOS, 9])[torch.randint(4, (int((~mask).sum()),))]
        segments.append((tokens, mask, mask))
    check_padded(model, segments)


@variants
def test_padding_anywhere_changes_nothing_where_documents_begin_and_end(variant: dict[str, Any]) -> None:
    model, segments = tiny(**variant, **MARKERS), []
    for _ in range(6):
        tokens, mask = random_tokens(3, T), torch.rand(3, T) < 0.6
        tokens[torch.rand(3, T) < 0.1] = SOS
        tokens[torch.rand(3, T) < 0.1] = EOS
        segments.append((tokens, mask, mask))
    check_padded(model, segments)


def last_ordinary(tokens: Tensor) -> int:
    """How many tokens are left when those of id 0 are taken off the end."""
    return max((i + 1 for i, token in enumerate(tokens.tolist()) if token != 0), default=0)


@variants
def test_a_run_of_pad_id_at_the_end_is_padding_without_a_mask(variant: dict[str, Any]) -> None:
    model, segments = tiny(**variant, pad_id=0), []
    for counts in ([T, 3, 0], [2, T, 5], [6, 6, 6], [T, T, T]):
        real, tokens = trailing(counts, T), random_tokens(3, T)
        tokens[:, [0, 3]] = 0  # an ordinary token where others follow
        real &= trailing([last_ordinary(row[:count]) for row, count in zip(tokens, counts, strict=True)], T)
        segments.append((tokens.masked_fill(~real, 0), real, None))
    check_padded(model, segments)


def test_pad_id_before_other_tokens_is_an_ordinary_token() -> None:
    model, tokens = tiny(pad_id=0), random_tokens(1, T)
    tokens[0, [0, 2, 3]] = 0
    memories = model.create_knn_memories(batch_size=1)
    torch.testing.assert_close(model(tokens, memories), model(tokens, mask=torch.ones(1, T, dtype=torch.bool)))
    assert entries(memories[0], 0).origins[:, 2].tolist() == tokens[0].tolist()
    every = F.cross_entropy(model(tokens).float().mT, tokens)
    torch.testing.assert_close(model(tokens, labels=tokens), every, check_dtype=False)


def test_with_a_mask_pad_id_at_the_end_is_an_ordinary_token() -> None:
    model, tokens = tiny(pad_id=0), random_tokens(1, T)
    tokens[0, 5:] = 0
    memories = model.create_knn_memories(batch_size=1)
    model(tokens, memories, mask=torch.ones(1, T, dtype=torch.bool))
    assert memories[0].num_entries == (T,)


def test_without_pad_id_there_is_no_padding() -> None:
    model, tokens = tiny(pad_id=None), torch.zeros(1, T, dtype=torch.int64)
    memories = model.create_knn_memories(batch_size=1)
    model(tokens, memories)
    assert memories[0].num_entries == (T,)


def test_the_step_from_the_last_token_to_padding_is_not_scored() -> None:
    """Labels that are the tokens shifted by one name the padding at the last token; with a real label it counts."""
    model, tokens = tiny(pad_id=0), random_tokens(1, T + 1)
    tokens[0, 5:] = 0
    tokens, labels = tokens[:, :-1], tokens[:, 1:].clone()
    log_probabilities = model(tokens)[0].log_softmax(dim=-1)
    scored = -log_probabilities[range(4), labels[0, :4]]
    assert model(tokens, labels=labels).item() == pytest.approx(scored.mean().item(), abs=1e-6)
    labels[0, 4] = 9
    scored = -log_probabilities[range(5), labels[0, :5]]
    assert model(tokens, labels=labels).item() == pytest.approx(scored.mean().item(), abs=1e-6)


@variants
def test_a_row_of_padding_keeps_its_state_and_memory(variant: dict[str, Any]) -> None:
    model = tiny(**variant)
    memories, tokens = model.create_knn_memories(batch_size=2), random_tokens(2, T)
    padding = torch.tensor([[True] * T, [False] * T])
    state = call(model, tokens, memories).state
    before = contents(memories)

    def next_logits(state: XLMemories | None) -> Call:
        return call(model, tokens, memories, state, add_knn_memory=False)

    expected = next_logits(state).result[1]
    state = call(model, random_tokens(2, T), memories, state, mask=padding).state
    for memory, rows in zip(memories, before, strict=True):
        assert_same_entries(entries(memory, 1), rows[1])
    torch.testing.assert_close(next_logits(state).result[1], expected)
