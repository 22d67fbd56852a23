"""What one segment hands to the next: Transformer-XL memory and the state of the short convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.model.state import XLMemories
from tests.model.helpers import (
    EVERYTHING,
    attention_outputs,
    call,
    entries,
    first_difference,
    origins_of,
    random_tokens,
    read,
    refused,
    stateful_variants,
    tiny,
)

# Transformer-XL memory


@pytest.mark.parametrize("memorizing", [(), 1], ids=["ordinary layer", "memorizing layer"])
@pytest.mark.parametrize("cuts", [(9, 18), (1, 18), (4, 13)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_two_segments_are_one_window_for_a_single_layer(memorizing: Any, cuts: tuple[int, int], kv_heads: int) -> None:
    """Only so if distances to the past are the true ones, and nothing of it is lost."""
    model = tiny(depth=1, memorizing_layers=memorizing, xl_max_memories=30, num_kv_heads=kv_heads)
    tokens = random_tokens(2, 18)
    state, logits = None, []
    for part in tokens.tensor_split(cuts, dim=1):
        if part.shape[1] > 0:
            logit, state = model(part, None, state)
            logits.append(logit)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens)[0], rtol=0, atol=1e-5)


def test_xl_memory_of_limited_length_is_a_sliding_window_that_forgets() -> None:
    model, tokens = tiny(depth=1, memorizing_layers=(), xl_max_memories=4), random_tokens(2, 18)
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] - 4 + 1) % 39 + 4
    logits, other = (read(model, text, None, segment_length=9).result for text in (tokens, changed))
    assert not torch.allclose(logits[:, 4:9], other[:, 4:9], atol=1e-4)
    assert torch.equal(logits[:, 9:], other[:, 9:])
    changed[:, 5] = (tokens[:, 5] - 4 + 1) % 39 + 4  # the last four are kept
    other = read(model, changed, None, segment_length=9).result
    assert not torch.allclose(logits[:, 9:], other[:, 9:], atol=1e-4)


def test_the_state_needs_no_gradient() -> None:
    model, tokens = tiny(**EVERYTHING), random_tokens(2, 9)
    state = call(model, tokens).state
    assert not any(tensor.requires_grad for tensor in (*state, *state.conv_states))


@pytest.mark.parametrize("capacity", [1, 4, 9, 13, 40])
@pytest.mark.parametrize("segment_length", [1, 4, 9])
def test_what_xl_discards_enters_the_memory_once_and_in_order(capacity: int, segment_length: int) -> None:
    """The first layer is the memorizing one: its pairs depend on their token alone, whenever they are computed."""
    fields: dict[str, Any] = {"memorizing_layers": 1, "max_knn_memories": 40, "num_kv_heads": 2}
    torch.manual_seed(1)
    model = tiny(**fields, xl_max_memories=capacity, xl_memory_layers=(1, 2))
    torch.manual_seed(1)
    plain = tiny(**fields)
    tokens = random_tokens(2, 31)
    memories, everything = model.create_knn_memories(batch_size=2), plain.create_knn_memories(batch_size=2)
    state = read(model, tokens, memories, segment_length).state
    plain(tokens, everything, origins=origins_of(tokens))
    discarded = max(31 - capacity, 0)
    assert memories[0].num_entries == (discarded, discarded)
    for row in range(2):
        stored, expected = entries(memories[0], row), entries(everything[0], row)
        assert torch.equal(stored.origins, expected.origins[:discarded])
        torch.testing.assert_close(stored.keys, expected.keys[:, :discarded])
        torch.testing.assert_close(stored.values, expected.values[:, :discarded])
        assert torch.equal(state.origins[row], expected.origins[discarded:])
        kept = state[0][row].to(expected.keys)
        torch.testing.assert_close(kept[:, :, 0], expected.keys[:, discarded:])
        torch.testing.assert_close(kept[:, :, 1], expected.values[:, discarded:])


def test_layers_without_xl_store_their_segment_at_once_beside_layers_with_it() -> None:
    model = tiny(memorizing_layers=(2, 3), xl_max_memories=5, xl_memory_layers=3)
    tokens, memories = random_tokens(1, 14), model.create_knn_memories(batch_size=1)
    read(model, tokens, memories, segment_length=7)
    assert entries(memories[0], 0).positions == list(range(14))
    assert entries(memories[1], 0).positions == list(range(9))


@pytest.mark.parametrize("shift", range(5))
@pytest.mark.parametrize("planted", range(3))
def test_a_layer_reads_the_xl_memory_shift_places_above(shift: int, planted: int) -> None:
    model = tiny(xl_max_memories=6, shift_xl_memories_down=shift)
    first, second = random_tokens(2, 2, 6)
    _, state = model(first)
    plain = attention_outputs(model, lambda: model(second, None, state))
    state[planted].normal_()
    changed = attention_outputs(model, lambda: model(second, None, state))
    assert first_difference(plain, changed) == (planted - shift) % 3


def test_a_layer_with_xl_writes_its_own_memory_whatever_the_shift() -> None:
    tokens, states = random_tokens(2, 6), []
    for shift in (0, 1):
        torch.manual_seed(1)
        states.append(tiny(xl_max_memories=4, shift_xl_memories_down=shift)(tokens)[1])
    for own, shifted in zip(*states, strict=True):
        torch.testing.assert_close(own, shifted)
    assert not torch.allclose(states[0][0], states[0][1], atol=1e-2)


def test_xl_shift_changes_the_result() -> None:
    tokens, logits = random_tokens(2, 12), []
    for shift in (0, 1, 3):
        torch.manual_seed(1)
        logits.append(read(tiny(xl_max_memories=6, shift_xl_memories_down=shift), tokens, None, 6).result)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    assert torch.equal(logits[0], logits[2])  # once round


# Convolutions


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("segment_length", [1, 3, 10])
@pytest.mark.parametrize("memorizing", [1, (1, 2)], ids=str)
def test_convolutions_run_on_from_segment_to_segment(width: int, segment_length: int, memorizing: Any) -> None:
    """Keys of the first layer depend on the last W tokens alone, so segments must not show in them."""
    model = tiny(memorizing_layers=memorizing, short_conv=width, num_kv_heads=2)
    for layer in model.layers:
        if hasattr(layer[0].fn, "short_conv"):
            torch.nn.init.normal_(layer[0].fn.short_conv.weight)
    tokens = random_tokens(2, 20)
    whole, in_parts = (model.create_knn_memories(batch_size=2) for _ in range(2))
    state = call(model, tokens, whole).state
    in_parts_state = read(model, tokens, in_parts, segment_length).state
    for row in range(2):
        torch.testing.assert_close(entries(whole[0], row).keys, entries(in_parts[0], row).keys)
    assert state.conv_states[0].shape[1] == width - 1
    torch.testing.assert_close(state.conv_states[0], in_parts_state.conv_states[0])


def test_convolutions_make_keys_depend_on_the_tokens_before() -> None:
    model, tokens = tiny(memorizing_layers=1, short_conv=3, qk_init="induction"), random_tokens(1, 9)
    keys = []
    for token in (5, 6):
        tokens[0, 4] = token
        memories = model.create_knn_memories(batch_size=1)
        model(tokens, memories)
        keys.append(entries(memories[0], 0).keys[0])
    differing = (keys[0] != keys[1]).any(dim=-1).nonzero().flatten().tolist()
    assert differing == [5, 6]  # keys of an induction head are made of the two tokens before theirs


def test_the_first_key_of_a_document_does_not_blow_up_the_gradient() -> None:
    """It is made of the tokens before it, of which there are none: a vector of length 0, to be normalised."""
    model, tokens = tiny(memorizing_layers=1, short_conv=3, qk_init="induction"), random_tokens(2, 9)
    loss, state = call(model, tokens, labels=tokens)
    (first,) = torch.autograd.grad(loss, model.layers[0][0].fn.short_conv.weight)
    loss = call(model, tokens, None, state, labels=tokens).result
    (later,) = torch.autograd.grad(loss, model.layers[0][0].fn.short_conv.weight)
    assert first.norm() < 100 * later.norm()


# The object itself


def state_of(model: MemorizingTransformer, lengths: list[int]) -> XLMemories:
    """The state after a first segment in which row r has lengths[r] tokens."""
    tokens = random_tokens(len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return call(model, tokens, mask=mask, origins=origins_of(tokens)).state


def real_positions(state: XLMemories, row: int) -> list[int]:
    real = torch.ones_like(state.origins[row, :, 0], dtype=torch.bool) if state.mask is None else state.mask[row]
    return state.origins[row, real, 1].tolist()


def continue_rows(model: MemorizingTransformer, state: XLMemories | None, tokens: Tensor) -> Tensor:
    return call(model, tokens, None, state).result


def test_uneven_rows_keep_their_own_last_pairs() -> None:
    state = state_of(tiny(**EVERYTHING), [7, 2, 5])
    assert [real_positions(state, row) for row in range(3)] == [[2, 3, 4, 5, 6], [0, 1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("rows", [[1], [0, 2], [], torch.tensor([False, True, False])], ids=str)
@stateful_variants
def test_cleared_rows_start_anew_and_others_go_on(variant: dict[str, Any], rows: Any) -> None:
    model = tiny(**variant)
    state, tokens = state_of(model, [9, 3, 6]), random_tokens(3, 7)
    went_on, anew = continue_rows(model, state, tokens), continue_rows(model, None, tokens)
    mixed = continue_rows(model, state.cleared(rows), tokens)
    chosen = rows.nonzero().flatten().tolist() if isinstance(rows, Tensor) else rows
    for row in range(3):
        torch.testing.assert_close(mixed[row], (anew if row in chosen else went_on)[row])
    assert not torch.allclose(anew, went_on, atol=1e-3)


@pytest.mark.parametrize("rows", [[3], [-1], [0, 5]])
def test_rows_that_are_not_there_cannot_be_cleared(rows: list[int]) -> None:
    with refused(r"expected rows from 0 to 2, got \["):
        state_of(tiny(**EVERYTHING), [4, 4, 4]).cleared(rows)


def test_cleared_leaves_the_state_itself_alone() -> None:
    state = state_of(tiny(**EVERYTHING), [4, 4, 4])
    state.cleared([0, 1, 2])
    assert real_positions(state, 1) == [0, 1, 2, 3]
    assert state.conv_states[0].any()


@stateful_variants
def test_taken_rows_go_on_as_they_would_have(variant: dict[str, Any]) -> None:
    model = tiny(**variant)
    state, tokens = state_of(model, [9, 3, 6]), random_tokens(3, 7)
    rows = torch.tensor([2, 0])
    taken = continue_rows(model, state.taken(rows), tokens[rows])
    torch.testing.assert_close(taken, continue_rows(model, state, tokens)[rows])


@pytest.mark.parametrize("lengths", [([2, 1, 2], [4, 3]), ([6, 4, 5], [1, 2]), ([4, 4, 4], [4, 4])], ids=str)
@stateful_variants
def test_replaced_rows_go_on_from_the_other_state(
    variant: dict[str, Any], lengths: tuple[list[int], list[int]]
) -> None:
    model = tiny(**variant)
    old, new, tokens = state_of(model, lengths[0]), state_of(model, lengths[1]), random_tokens(3, 7)
    rows = torch.tensor([2, 0])
    mixed = continue_rows(model, old.replaced(rows, new), tokens)
    torch.testing.assert_close(mixed[rows], continue_rows(model, new, tokens[rows]))
    torch.testing.assert_close(mixed[1], continue_rows(model, old, tokens)[1])


def test_the_initial_state_is_as_none() -> None:
    model, tokens = tiny(**EVERYTHING), random_tokens(2, 7)
    torch.testing.assert_close(
        continue_rows(model, model.initial_state(2), tokens), continue_rows(model, None, tokens), rtol=0, atol=0
    )


def test_a_call_leaves_the_state_that_it_was_given_alone() -> None:
    """So the same state can be used again, as for reading only or for trying again."""
    model, tokens = tiny(**EVERYTHING), random_tokens(2, 7)
    state = state_of(model, [6, 3])
    first = continue_rows(model, state, tokens)
    assert torch.equal(first, continue_rows(model, state, tokens))


@pytest.mark.parametrize("rows", [[1], torch.tensor([1]), torch.tensor([False, True, False]), range(1, 2)], ids=str)
@stateful_variants
def test_rows_to_be_cleared_may_be_numbers_or_a_mask(variant: dict[str, Any], rows: Any) -> None:
    state = state_of(tiny(**variant), [4, 4, 4])
    left, right = state.cleared(rows), state.cleared([1])
    for one, other in zip(left.conv_states, right.conv_states, strict=True):
        assert torch.equal(one, other)
    assert left.mask is not None
    assert right.mask is not None
    assert torch.equal(left.mask, right.mask)
    assert left.mask.dtype == torch.bool


@stateful_variants
def test_clearing_no_row_changes_nothing(variant: dict[str, Any]) -> None:
    state = state_of(tiny(**variant), [4, 4, 4])
    assert state.cleared([]) is state


def test_a_mask_for_another_number_of_rows_is_refused() -> None:
    state = state_of(tiny(xl_max_memories=4), [4, 4, 4])
    with refused():
        state.cleared(torch.tensor([True, False]))
