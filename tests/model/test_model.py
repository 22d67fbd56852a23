"""What a forward call gives back, what it attends to, what it remembers, and the gradients that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.model.state import XLMemories
from tests.model.helpers import (
    EVERYTHING,
    NUM_TOKENS,
    assert_same_contents,
    assert_same_gradients,
    attention_outputs,
    call,
    contents,
    entries,
    first_difference,
    gradients,
    origins_of,
    plant,
    random_tokens,
    read,
    tiny,
    variants,
)

# What comes back


@pytest.mark.parametrize(
    ("changes", "carries_state"),
    [
        ({}, False),
        ({"xl_max_memories": 3}, True),
        ({"xl_max_memories": 3, "xl_memory_layers": ()}, False),
        ({"short_conv": 2}, True),
        ({"short_conv": 2, "memorizing_layers": ()}, False),
    ],
    ids=str,
)
def test_state_comes_back_only_where_there_is_any(changes: dict[str, Any], carries_state: bool) -> None:
    model, tokens = tiny(**changes), random_tokens(2, 7)
    results = (model(tokens), model(tokens, labels=tokens))
    assert model.carries_state == carries_state
    if carries_state:
        assert all(isinstance(state, XLMemories) for _, state in results)
        results = tuple(result for result, _ in results)
    logits, loss = results
    assert logits.shape == (2, 7, NUM_TOKENS)
    assert loss.shape == ()


@variants
def test_a_token_never_sees_what_follows_it(variant: dict[str, Any]) -> None:
    model, tokens = tiny(**variant), random_tokens(2, 9)
    changed = torch.cat((tokens[:, :5], random_tokens(2, 4)), dim=1)
    torch.testing.assert_close(call(model, tokens).result[:, :5], call(model, changed).result[:, :5])


# Labels


def test_loss_is_the_mean_cross_entropy() -> None:
    model, tokens, labels = tiny(), random_tokens(3, 7), random_tokens(3, 7)
    torch.testing.assert_close(
        model(tokens, labels=labels), F.cross_entropy(model(tokens).float().mT, labels), check_dtype=False
    )


def test_token_0_is_a_target_like_any_other() -> None:
    model = tiny(pad_id=0)
    tokens, labels = random_tokens(3, 7), torch.zeros(3, 7, dtype=torch.int64)
    expected = F.cross_entropy(model(tokens).float().mT, labels)
    torch.testing.assert_close(model(tokens, labels=labels), expected, check_dtype=False)


def test_labels_of_minus_100_are_not_scored() -> None:
    model, tokens, labels = tiny(), random_tokens(3, 7), random_tokens(3, 7)
    labels[0], labels[2, 3:] = -100, -100
    expected = F.cross_entropy(model(tokens).float().mT, labels, ignore_index=-100)
    torch.testing.assert_close(model(tokens, labels=labels), expected, check_dtype=False)


def test_loss_without_any_target_is_zero_and_has_zero_gradients() -> None:
    model, tokens = tiny(), random_tokens(2, 3)
    loss = model(tokens, labels=torch.full_like(tokens, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


# With and without memories


@variants
def test_empty_memories_are_as_none_because_the_search_comes_before_the_add(variant: dict[str, Any]) -> None:
    model, tokens = tiny(**variant, num_retrieved_memories=50), random_tokens(2, 9)
    memories = model.create_knn_memories(batch_size=2)
    torch.testing.assert_close(call(model, tokens, memories).result, call(model, tokens).result)
    assert any(memory.num_entries[0] > 0 for memory in memories)


@variants
def test_entries_of_an_earlier_segment_change_the_result(variant: dict[str, Any]) -> None:
    model, tokens = tiny(**variant), random_tokens(2, 18)
    with_memory = read(model, tokens, model.create_knn_memories(batch_size=2), segment_length=9)
    without = read(model, tokens, None, segment_length=9)
    torch.testing.assert_close(with_memory.result[:, :9], without.result[:, :9])
    assert not torch.allclose(with_memory.result[:, 9:], without.result[:, 9:], atol=1e-3)


@variants
def test_reading_only_gives_the_same_and_stores_nothing(variant: dict[str, Any]) -> None:
    model, (first, second) = tiny(**variant), random_tokens(2, 2, 9)
    memories = model.create_knn_memories(batch_size=2)
    state = call(model, first, memories).state
    before = contents(memories)
    read_only = call(model, second, memories, state, add_knn_memory=False)
    assert_same_contents(contents(memories), before)
    torch.testing.assert_close(read_only.result, call(model, second, memories, state).result, rtol=0, atol=0)
    assert contents(memories)[0][0].origins.shape[0] > before[0][0].origins.shape[0]


def test_memory_that_gives_back_everything_equals_a_longer_window() -> None:
    """Retrieved keys have no position; without a bias for local ones either, the two are the same attention."""
    model = tiny(depth=1, memorizing_layers=1, num_retrieved_memories=30, max_knn_memories=30)
    tokens = random_tokens(2, 21)
    nn.init.zeros_(model.knn_rel_pos_bias.relative_attention_bias.weight)
    in_segments = read(model, tokens, model.create_knn_memories(batch_size=2), segment_length=5)
    torch.testing.assert_close(in_segments.result, model(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradients_through_the_memory_are_those_through_a_window_whose_past_is_fixed(kv_heads: int) -> None:
    """XL memory is such a window. Without position biases a memory that gives back everything is the same."""
    fields: dict[str, Any] = {
        "depth": 1,
        "memorizing_layers": 1,
        "num_retrieved_memories": 30,
        "num_kv_heads": kv_heads,
    }
    first, second = random_tokens(2, 2, 9)
    results = []
    for xl_max_memories in (0, 30):
        torch.manual_seed(1)
        model = tiny(**fields, xl_max_memories=xl_max_memories)
        nn.init.zeros_(model.knn_rel_pos_bias.relative_attention_bias.weight)
        memories = None if xl_max_memories > 0 else model.create_knn_memories(batch_size=2)
        state = call(model, first, memories).state
        call(model, second, memories, state, labels=second).result.backward()
        results.append({n: g for n, g in gradients(model).items() if "rel_pos_bias" not in n})
    assert "layers.0.0.fn.scale" in results[0]
    assert_same_gradients(*results)


def test_stored_are_the_last_tokens_of_each_row() -> None:
    model, tokens = tiny(max_knn_memories=11), random_tokens(3, 26)
    memories = model.create_knn_memories(batch_size=3)
    read(model, tokens, memories, segment_length=4)
    for row in range(3):
        assert entries(memories[0], row).positions == list(range(15, 26))
        assert entries(memories[0], row).tokens == tokens[row, 15:].tolist()


def test_origins_are_the_tokens_where_nothing_else_is_known() -> None:
    model, tokens = tiny(), random_tokens(1, 4)
    memories = model.create_knn_memories(batch_size=1)
    model(tokens, memories)
    assert entries(memories[0], 0).origins.tolist() == [[-1, -1, token] for token in tokens[0].tolist()]


def test_k_beyond_what_is_stored_or_can_be_is_masked() -> None:
    tokens = random_tokens(1, 12)
    results = []
    for k in (5, 500):
        torch.manual_seed(1)
        model = tiny(max_knn_memories=5, num_retrieved_memories=k)
        results.append(read(model, tokens, model.create_knn_memories(batch_size=1), segment_length=3).result)
    torch.testing.assert_close(*results)


def test_without_memorizing_layers_the_list_of_memories_is_empty() -> None:
    model, tokens = tiny(memorizing_layers=()), random_tokens(2, 5)
    with model.knn_memories_context(batch_size=2) as memories:
        assert len(memories) == 0
        torch.testing.assert_close(model(tokens, memories), model(tokens))
        model(tokens, memories, labels=tokens).backward()
    assert model.layers[1][0].fn.to_q.weight.grad is not None


def test_memories_are_cleaned_up_also_after_an_exception() -> None:
    model = tiny()
    with pytest.raises(KeyError), model.knn_memories_context(batch_size=2) as memories:  # noqa: PT012
        model(random_tokens(2, 5), memories)
        raise KeyError
    with pytest.raises(ValueError, match="closed by cleanup"):
        _ = memories[0].store


def test_memory_mapped_memories_give_the_same(tmp_path: Path) -> None:
    tokens, results = random_tokens(2, 18), []
    for directory in (None, str(tmp_path)):
        torch.manual_seed(1)
        model = tiny(**EVERYTHING, knn_memories_directory=directory)
        with model.knn_memories_context(batch_size=2) as memories:
            results.append(read(model, tokens, memories, segment_length=6).result)
    assert torch.equal(*results)


# Heads


@pytest.mark.parametrize("combine", ["softmax", "gate"])
@pytest.mark.parametrize(("heads", "knn_heads", "kv_heads"), [(4, None, 1), (4, 2, 2), (2, 6, 2), (3, 3, 3), (1, 1, 1)])
def test_any_heads_read_memory_and_train(heads: int, knn_heads: int | None, kv_heads: int, combine: str) -> None:
    model = tiny(heads=heads, knn_attn_heads=knn_heads, num_kv_heads=kv_heads, combine=combine, xl_max_memories=2)
    tokens, memories = random_tokens(2, 14), model.create_knn_memories(batch_size=2)
    state = call(model, tokens[:, :7], memories).state
    assert memories[0].store.keys.shape[1] == kv_heads
    with_memory, without = (call(model, tokens[:, 7:], m, state, add_knn_memory=False) for m in (memories, None))
    assert not torch.allclose(with_memory.result, without.result, atol=1e-3)
    call(model, tokens[:, 7:], memories, state, labels=tokens[:, 7:]).result.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_each_key_value_head_has_its_own_keys() -> None:
    model, tokens = tiny(num_kv_heads=2), random_tokens(1, 6)
    memories = model.create_knn_memories(batch_size=1)
    model(tokens, memories)
    keys = entries(memories[0], 0).keys
    assert keys.shape == (2, 6, 6)
    assert not torch.allclose(keys[0], keys[1], atol=1e-2)


# Tied embeddings


def test_tied_embeddings_are_one_parameter() -> None:
    model, tokens = tiny(tie_embeddings=True), random_tokens(2, 5)
    hidden: list[Tensor] = []
    model.to_logits[0].register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    logits = model(tokens)
    torch.testing.assert_close(logits, hidden[0] @ model.token_emb.weight.mT + model.to_logits[1].bias)
    assert sum(p.shape == (NUM_TOKENS, 20) for p in model.parameters()) == 1
    assert model.to_logits[1].weight is model.token_emb.weight


# Shift of the memories that layers read


@pytest.mark.parametrize("shift", range(5))
@pytest.mark.parametrize("planted", range(3))
def test_a_layer_reads_the_memory_shift_places_above(shift: int, planted: int) -> None:
    model = tiny(memorizing_layers=(1, 2, 3), shift_knn_memories_down=shift)
    tokens, memories = random_tokens(2, 5), model.create_knn_memories(batch_size=2)
    plain = attention_outputs(model, lambda: model(tokens, memories, add_knn_memory=False))
    plant(memories[planted])
    changed = attention_outputs(model, lambda: model(tokens, memories, add_knn_memory=False))
    assert first_difference(plain, changed) == (planted - shift) % 3


def test_a_layer_writes_its_own_memory_whatever_the_shift() -> None:
    tokens, stored = random_tokens(2, 5), []
    for shift in (0, 1):
        torch.manual_seed(1)
        model = tiny(memorizing_layers=(1, 3), shift_knn_memories_down=shift)
        memories = model.create_knn_memories(batch_size=2)
        model(tokens, memories)
        stored.append(contents(memories))
    assert_same_contents(*stored)
    assert not torch.allclose(stored[0][0][0].keys, stored[0][1][0].keys, atol=1e-2)


def test_shift_changes_the_result() -> None:
    tokens, logits = random_tokens(2, 10), []
    for shift in (0, 1, 2):
        torch.manual_seed(1)
        model = tiny(memorizing_layers=(1, 3), shift_knn_memories_down=shift)
        logits.append(read(model, tokens, model.create_knn_memories(batch_size=2), segment_length=5).result)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    assert torch.equal(logits[0], logits[2])  # once round


# Parts of the batch


@variants
def test_parts_of_the_batch_give_the_gradients_and_contents_of_the_whole(variant: dict[str, Any]) -> None:
    model, tokens = tiny(**variant), random_tokens(3, 36)
    parts = [[2, 0], [1]]

    def train(groups: list[list[int]]) -> tuple[dict[str, Tensor], Any]:
        model.zero_grad()
        memories = model.create_knn_memories(batch_size=3)
        states: list[XLMemories | None] = [None] * len(groups)
        for segment in tokens.split(9, dim=1):
            for i, rows in enumerate(groups):
                with memories.at_batch_indices(rows) as scoped:
                    loss, states[i] = call(model, segment[rows], scoped, states[i], labels=segment[rows])
                (loss * len(rows) / 3).backward()
        return gradients(model), contents(memories)

    (whole, whole_contents), (accumulated, accumulated_contents) = train([[0, 1, 2]]), train(parts)
    assert_same_gradients(whole, accumulated)
    assert_same_contents(whole_contents, accumulated_contents, tolerance=1e-6)


def test_other_rows_stay_as_they_are_outside_the_scope() -> None:
    model = tiny(clear_memories_on_sos_token_id=1, clear_memories_on_eos_token_id=2)
    memories = model.create_knn_memories(batch_size=4)
    model(random_tokens(4, 5), memories)
    before = contents(memories)
    tokens = random_tokens(2, 6)
    tokens[0, 3], tokens[1, 2] = 1, 2
    with memories.at_batch_indices([3, 1]):
        model(tokens, memories)
    after = contents(memories)
    assert_same_contents([[after[0][0], after[0][2]]], [[before[0][0], before[0][2]]])
    assert after[0][3].tokens == tokens[0, 3:].tolist()
    assert after[0][1].tokens == tokens[1, 3:].tolist()


# Backward


@pytest.mark.parametrize(("memory_dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 5e-4)])
@variants
def test_one_late_backward_gives_the_gradients_of_many_early_ones(
    variant: dict[str, Any], memory_dtype: str, tolerance: float
) -> None:
    """The ring turns between forward and backward; what each segment has found must be what its gradient uses."""
    model, segments = tiny(**variant, max_knn_memories=12, memory_dtype=memory_dtype), random_tokens(2, 45).split(9, 1)

    memories, state, losses = model.create_knn_memories(batch_size=2), None, []
    for segment in segments:
        loss, state = call(model, segment, memories, state, labels=segment)
        losses.append(loss)
    torch.stack(losses).sum().backward()
    late = gradients(model)

    model.zero_grad()
    memories, state = model.create_knn_memories(batch_size=2), None
    for segment in segments:
        call(model, segment, memories, state, labels=segment, add_knn_memory=False).result.backward()
        with torch.no_grad():
            state = call(model, segment, memories, state).state
    assert memories[0].num_entries == (12, 12)
    assert_same_gradients(late, gradients(model), tolerance)


@variants
def test_gradient_checkpointing_changes_nothing_but_the_cost(variant: dict[str, Any]) -> None:
    """At capacity, with one backward for several segments: layers are recomputed after the ring has turned."""
    segments = random_tokens(2, 36).split(9, 1)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = tiny(**variant, max_knn_memories=10, gradient_checkpointing=checkpointing)
        memories, state, losses = model.create_knn_memories(batch_size=2), None, []
        for segment in segments:
            loss, state = call(model, segment, memories, state, labels=segment)
            losses.append(loss)
        torch.stack(losses).sum().backward()
        results.append((torch.stack(losses), gradients(model), contents(memories)))
    (losses, grads, stored), (other_losses, other_grads, other_stored) = results
    torch.testing.assert_close(losses, other_losses)
    assert_same_gradients(grads, other_grads)
    assert_same_contents(stored, other_stored)


def test_gradient_checkpointing_repeats_dropout() -> None:
    results = []
    tokens = random_tokens(2, 18)
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = tiny(attn_dropout=0.3, ff_dropout=0.3, gradient_checkpointing=checkpointing)
        memories = model.create_knn_memories(batch_size=2)
        model(tokens[:, :9], memories)
        loss = model(tokens[:, 9:], memories, labels=tokens[:, 9:])
        loss.backward()
        results.append(gradients(model))
    assert_same_gradients(*results)


def test_the_memory_gets_no_gradient() -> None:
    model, tokens = tiny(), random_tokens(1, 5)
    memories = model.create_knn_memories(batch_size=1)
    model(tokens, memories, labels=tokens)
    assert not memories[0].store.keys.numbers.requires_grad
    assert not memories[0].store.values.numbers.requires_grad


# What happens when something breaks, and in inference mode


def break_attention(model: MemorizingTransformer) -> nn.Module:
    return model.layers[-1][0]


def break_feed_forward(model: MemorizingTransformer) -> nn.Module:
    return model.layers[-1][1]


def break_output(model: MemorizingTransformer) -> nn.Module:
    return model.to_logits


@pytest.mark.parametrize("module_of", [break_attention, break_feed_forward, break_output])
@pytest.mark.parametrize("labelled", [False, True])
def test_an_exception_in_the_middle_leaves_the_memories_as_before(
    module_of: Any, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny(memorizing_layers=(1, 2), clear_memories_on_eos_token_id=2), random_tokens(2, 5)
    memories = model.create_knn_memories(batch_size=2)
    model(tokens, memories)
    before = contents(memories)

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module_of(model), "forward", fail)
    tokens[0, 2] = 2
    with pytest.raises(RuntimeError, match="out of memory"):
        model(tokens, memories, labels=tokens if labelled else None)
    assert_same_contents(contents(memories), before)


@variants
def test_a_memory_made_in_inference_mode_can_be_used_outside(variant: dict[str, Any]) -> None:
    model, tokens = tiny(**variant), random_tokens(2, 18)
    with torch.inference_mode():
        memories = model.create_knn_memories(batch_size=2)
        logits = call(model, tokens[:, :9], memories).result
    torch.testing.assert_close(logits, call(model, tokens[:, :9]).result)
    loss = call(model, tokens[:, 9:], memories, labels=tokens[:, 9:]).result
    loss.backward()
    assert loss.isfinite()


def test_a_memory_made_outside_can_be_used_in_inference_mode() -> None:
    model, tokens = tiny(), random_tokens(2, 18)
    expected = read(model, tokens, model.create_knn_memories(batch_size=2), segment_length=9).result
    memories = model.create_knn_memories(batch_size=2)
    with torch.inference_mode():
        got = read(model, tokens, memories, segment_length=9).result
    torch.testing.assert_close(got, expected)


def test_training_with_dropout_is_random_and_evaluation_is_not() -> None:
    model, tokens = tiny(attn_dropout=0.5, ff_dropout=0.5), random_tokens(1, 5)
    assert not torch.equal(model(tokens), model(tokens))
    with model.evaluating():
        assert torch.equal(model(tokens), model(tokens))
    assert model.training


def test_segments_that_were_read_in_one_go_have_the_same_origins_as_those_in_parts() -> None:
    model, tokens = tiny(), random_tokens(2, 12)
    whole, parts = (model.create_knn_memories(batch_size=2) for _ in range(2))
    model(tokens, whole, origins=origins_of(tokens, document=7))
    read(model, tokens, parts, segment_length=5)
    assert torch.equal(entries(whole[0], 0).origins[:, 1:], entries(parts[0], 0).origins[:, 1:])
    assert entries(whole[0], 0).origins[:, 0].unique().tolist() == [7]


@pytest.mark.parametrize("layers", [(), 1, (1, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("combine", ["softmax", "gate"])
@pytest.mark.parametrize("with_memory", [False, True])
def test_every_parameter_that_is_trained_gets_a_gradient(layers: Any, combine: str, with_memory: bool) -> None:
    """As DistributedDataParallel needs, whether or not a memory is passed and whatever it holds."""
    model, tokens = tiny(memorizing_layers=layers, combine=combine), random_tokens(2, 9)
    result = model(tokens, model.create_knn_memories(batch_size=2) if with_memory else None, labels=tokens)
    (result[0] if model.carries_state else result).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_tensors_on_another_device_are_refused() -> None:
    model, tokens = tiny(), random_tokens(2, 9)
    with pytest.raises(ValueError, match="expected labels on cpu, got meta"):
        model(tokens, labels=tokens.to("meta"))
    with pytest.raises(ValueError, match="expected x on cpu, got meta"):
        model(tokens.to("meta"))
