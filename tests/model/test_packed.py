"""Documents that the caller packs into rows (`starts`) are read as each would be alone; hidden memory is not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch import KNNMemoryList, MemorizingTransformer
from memorizing_transformers_pytorch.model.state import XLMemories
from tests.model.helpers import (
    EOS,
    EVERYTHING,
    SOS,
    assert_same_contents,
    assert_same_entries,
    assert_same_gradients,
    call,
    contents,
    entries,
    gradients,
    origins_of,
    plant,
    random_tokens,
    refused,
    tiny,
    variants,
)

T, SEGMENTS, ROWS = 7, 4, 3


class Stream(NamedTuple):
    """tokens, starts and mask (B, N), of whole segments of T. Every row begins with a document."""

    tokens: Tensor
    starts: Tensor
    mask: Tensor

    def segments(self) -> Iterator[tuple[Tensor, ...]]:
        """tokens, starts, mask, origins of each segment."""
        origins = origins_of(self.tokens)
        return zip(*(part.split(T, dim=1) for part in (*self, origins)), strict=True)


def random_stream(*, share_of_starts: float, share_of_padding: float) -> Stream:
    shape = (ROWS, SEGMENTS * T)
    return Stream(random_tokens(*shape), torch.rand(shape) < share_of_starts, torch.rand(shape) >= share_of_padding)


class Read(NamedTuple):
    """logits (B, N, num_tokens), and what is remembered in the end."""

    logits: Tensor
    memories: KNNMemoryList
    state: XLMemories | None


def read_packed(model: MemorizingTransformer, stream: Stream) -> Read:
    memories, state, logits = model.create_knn_memories(batch_size=ROWS), None, []
    for tokens, starts, mask, origins in stream.segments():
        result, state = call(model, tokens, memories, state, mask=mask, origins=origins, starts=starts)
        logits.append(result)
    return Read(torch.cat(logits, dim=1), memories, state)


def read_alone(model: MemorizingTransformer, stream: Stream, row: int) -> Read:
    """One row, document by document and without padding, in the slices that the segments leave of each.

    Logits are 0 on padding; memories and state are those of the last document.
    """
    memories, state, logits = model.create_knn_memories(batch_size=1), None, []
    for tokens, starts, mask, origins in stream.segments():
        real = mask[row].nonzero().squeeze(-1).tolist()
        slices: list[list[int]] = [[]]
        for place in real:
            if starts[row, place]:
                slices.append([])
            slices[-1].append(place)
        for number, places in enumerate(slices):
            if number > 0:
                memories, state = model.create_knn_memories(batch_size=1), None
            if places:
                arguments = {"origins": origins[row : row + 1, places], "mask": torch.ones(1, len(places)).bool()}
                result, state = call(model, tokens[row : row + 1, places], memories, state, **arguments)
                logits.append(result)
    at = torch.zeros(stream.tokens.shape[1], logits[0].shape[-1], dtype=torch.float64)
    return Read(at.index_put((stream.mask[row],), torch.cat(logits, dim=1)[0]), memories, state)


def held(state: XLMemories, row: int) -> list[Tensor]:
    """What a row carries on: pairs and origins that are real, and inputs of convolutions."""
    real = torch.ones_like(state.origins[row, :, 0], dtype=torch.bool) if state.mask is None else state.mask[row]
    return [*(pairs[row][:, real] for pairs in state), state.origins[row, real], *(s[row] for s in state.conv_states)]


@pytest.mark.parametrize("share_of_padding", [0.0, 0.4])
@pytest.mark.parametrize("share_of_starts", [0.05, 0.3, 1.0])
@variants
@torch.no_grad()
def test_packed_documents_are_read_as_each_alone(
    variant: dict[str, Any], share_of_starts: float, share_of_padding: float
) -> None:
    model = tiny(**variant, max_knn_memories=11)
    stream = random_stream(share_of_starts=share_of_starts, share_of_padding=share_of_padding)
    packed = read_packed(model, stream)
    for row in range(ROWS):
        alone = read_alone(model, stream, row)
        real = stream.mask[row]
        torch.testing.assert_close(packed.logits[row, real], alone.logits[real], rtol=0, atol=1e-6)
        for memory, own in zip(packed.memories, alone.memories, strict=True):
            assert_same_entries(entries(memory, row), entries(own, 0), tolerance=1e-6)
        if packed.state is not None and alone.state is not None:
            torch.testing.assert_close(held(packed.state, row), held(alone.state, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@variants
def test_gradients_of_packed_documents_are_those_of_each_alone(
    variant: dict[str, Any], gradient_checkpointing: bool
) -> None:
    model = tiny(**variant, max_knn_memories=11, gradient_checkpointing=gradient_checkpointing)
    stream, both = random_stream(share_of_starts=0.2, share_of_padding=0.2), []
    for reading in ("packed", "alone"):
        model.zero_grad()
        if reading == "packed":
            logits = read_packed(model, stream).logits
        else:
            logits = torch.stack([read_alone(model, stream, row).logits for row in range(ROWS)])
        F.cross_entropy(logits[stream.mask], stream.tokens[stream.mask]).backward()
        both.append(gradients(model))
    assert_same_gradients(*both)


@variants
def test_starts_at_the_first_token_are_rows_cleared_beforehand(variant: dict[str, Any]) -> None:
    model, (before, tokens) = tiny(**variant), random_tokens(2, ROWS, T)
    starts = torch.zeros(ROWS, T, dtype=torch.bool)
    starts[1, 0] = True
    memories, cleared = (model.create_knn_memories(batch_size=ROWS) for _ in range(2))
    state, cleared_state = (call(model, before, these).state for these in (memories, cleared))
    cleared.clear_memory(1)
    expected = call(model, tokens, cleared, None if cleared_state is None else cleared_state.cleared([1]))
    logits = call(model, tokens, memories, state, starts=starts).result
    assert torch.equal(logits, expected.result)
    assert_same_contents(contents(memories), contents(cleared))


@variants
def test_without_a_start_starts_change_nothing(variant: dict[str, Any]) -> None:
    model, tokens, none = tiny(**variant), random_tokens(ROWS, T), torch.zeros(ROWS, T, dtype=torch.bool)
    with_starts, without = (model.create_knn_memories(batch_size=ROWS) for _ in range(2))
    for _ in range(3):
        assert torch.equal(call(model, tokens, with_starts, starts=none).result, call(model, tokens, without).result)
    assert_same_contents(contents(with_starts), contents(without))


def test_starts_on_padding_count_for_nothing() -> None:
    model, tokens, mask = tiny(**EVERYTHING), random_tokens(ROWS, T), torch.rand(ROWS, T) < 0.6
    results = [call(model, tokens, mask=mask, starts=starts).result for starts in (None, ~mask)]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("marker", "at", "start", "survive_from"),
    [(SOS, 2, 4, 4), (SOS, 4, 2, 4), (EOS, 2, 4, 4), (EOS, 4, 2, 5), (SOS, 3, 3, 3), (EOS, 3, 3, 4), (EOS, 6, 0, 7)],
)
def test_of_markers_and_starts_what_follows_the_last_survives(
    marker: int, at: int, start: int, survive_from: int
) -> None:
    model = tiny(clear_memories_on_sos_token_id=SOS, clear_memories_on_eos_token_id=EOS)
    tokens, starts = random_tokens(2, T), torch.zeros(2, T, dtype=torch.bool)
    tokens[0, at], starts[0, start] = marker, True
    memories = model.create_knn_memories(batch_size=2)
    plant(memories[0])
    model(tokens, memories, starts=starts)
    assert entries(memories[0], 0).origins[:, 2].tolist() == tokens[0, survive_from:].tolist()
    assert memories[0].num_entries[1] == 9 + T


def test_reading_only_clears_nothing_where_documents_start() -> None:
    model, memories = tiny(), tiny().create_knn_memories(batch_size=2)
    plant(memories[0])
    before = contents(memories)
    model(random_tokens(2, T), memories, add_knn_memory=False, starts=torch.rand(2, T) < 0.5)
    assert_same_contents(contents(memories), before)


# Hidden memory


@variants
def test_rows_whose_memory_is_hidden_are_read_without_it(variant: dict[str, Any]) -> None:
    model, tokens, hidden = tiny(**variant), random_tokens(ROWS, T), torch.tensor([False, True, False])
    memories = model.create_knn_memories(batch_size=ROWS)
    for memory in memories:
        plant(memory)
    seen, blind = (call(model, tokens, these, add_knn_memory=False).result for these in (memories, None))
    logits = call(model, tokens, memories, hide_memory=hidden).result
    torch.testing.assert_close(logits, torch.where(hidden[:, None, None], blind, seen))
    assert not torch.allclose(seen[1], blind[1], atol=1e-4)


def test_hidden_memory_is_written_as_ever() -> None:
    model, tokens = tiny(), random_tokens(ROWS, T)
    ordinary, hidden = (model.create_knn_memories(batch_size=ROWS) for _ in range(2))
    for _ in range(3):
        model(tokens, ordinary)
        model(tokens, hidden, hide_memory=torch.tensor([True, False, True]))
    assert_same_contents(contents(ordinary), contents(hidden))


def test_hidden_memory_and_starts_in_the_segment_go_together() -> None:
    model, tokens, starts = tiny(), random_tokens(2, T), torch.zeros(2, T, dtype=torch.bool)
    starts[:, 4] = True
    memories = model.create_knn_memories(batch_size=2)
    plant(memories[0])
    arguments = {"add_knn_memory": False, "starts": starts}
    seen, blind = model(tokens, memories, **arguments), model(tokens, **arguments)
    logits = model(tokens, memories, hide_memory=torch.tensor([True, False]), **arguments)
    torch.testing.assert_close(logits, torch.stack((blind[0], seen[1])))
    assert not torch.allclose(seen[1, :4], blind[1, :4], atol=1e-4)
    torch.testing.assert_close(seen[:, 4:], blind[:, 4:])


# Bad input


@pytest.mark.parametrize(
    "arguments",
    [
        {"starts": torch.zeros(2, T)},
        {"starts": torch.zeros(2, T - 1, dtype=torch.bool)},
        {"starts": torch.zeros(2, dtype=torch.bool)},
        {"starts": torch.zeros(2, T, dtype=torch.bool, device="meta")},
        {"hide_memory": torch.zeros(2)},
        {"hide_memory": torch.zeros(3, dtype=torch.bool)},
        {"hide_memory": torch.zeros(2, T, dtype=torch.bool)},
        {"hide_memory": torch.zeros(2, dtype=torch.bool, device="meta")},
    ],
    ids=lambda arguments: str({name: (x.dtype, *x.shape) for name, x in arguments.items()}),
)
def test_starts_and_hidden_rows_that_do_not_fit_are_refused(arguments: dict[str, Tensor]) -> None:
    model = tiny()
    memories = model.create_knn_memories(batch_size=2)
    with refused():
        model(random_tokens(2, T), memories, **arguments)
    assert memories[0].num_entries == (0, 0)
