"""Attention to retrieved entries equals that to gathered copies, however late its backward pass comes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch.attention.ops import (
    NOTHING,
    found_weights,
    memory_attention,
    sampled_inner_products,
    weighted_sums,
)
from memorizing_transformers_pytorch.memory import KNNMemory, Lookup
from tests.reference import Found, gathered_logits, gathered_sums

HEADS, LENGTH, DIM, TOPK = 4, 3, 7, 5
FLOAT64, FLOAT32 = (torch.float64, 1e-10), (torch.float32, 1e-5)
# Sums of half-precision numbers: errors as a share of the norm of the whole result, a few times those of rounding once.
HALVES = [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)]


def filled_memory(sizes: Sequence[int], *, kv_heads: int = 1, dtype: torch.dtype = torch.float32) -> KNNMemory:
    """A memory whose rows have had so many random entries each; the rings turn after 11."""
    memory = KNNMemory(DIM, 11, len(sizes), num_kv_heads=kv_heads, dtype=dtype)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    memory.add(torch.randn(len(sizes), kv_heads, max(sizes), 2, DIM), mask)
    return memory


def gathered(memory: KNNMemory, queries: Tensor, lookup: Lookup) -> Found:
    """Copies of what a lookup found, in the dtype of the queries."""
    key_values, _ = memory.search(queries, TOPK)
    keys, values = key_values.to(queries.dtype).unbind(dim=-2)
    return Found(keys, values, lookup.mask)


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 1.5},
    "with something subtracted": {"less": torch.tensor([0.0, 0.5, 2.0, 7.0]).view(4, 1, 1, 1)},
    "capped and subtracted": {"softcap": 3.0, "less": torch.tensor([0.3, 0.5, 2.0, 7.0]).view(4, 1, 1, 1)},
}


def slow(
    queries: Tensor, multiplier: Tensor, found: Found, *, less: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse from gathered copies."""
    logits = gathered_logits(queries, found.keys) * multiplier
    logits = logits if softcap is None else (logits / softcap).tanh() * softcap
    logits = logits if less is None else logits - less
    exponentials = logits.exp() * found.mask
    total = exponentials.sum(dim=-1)
    there = found.mask.any(dim=-1)
    out = gathered_sums(exponentials, found.values) / total.where(there, 1).unsqueeze(-1)
    return out, total.where(there, 1).log().where(there, NOTHING)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("store_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [FLOAT64, FLOAT32])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("hidden_rows", [None, torch.tensor([False, False, False, True])])
def test_results_and_gradients_equal_gathering(
    dtype: torch.dtype,
    tolerance: float,
    store_dtype: torch.dtype,
    kv_heads: int,
    hidden_rows: Tensor | None,
    setting: dict[str, Any],
) -> None:
    sizes = (0, 2, 11, 29)  # none, fewer than asked for, all, more than fit
    memory = filled_memory(sizes, kv_heads=kv_heads, dtype=store_dtype)
    queries, multiplier = leaf(4, HEADS, LENGTH, DIM, dtype=dtype), leaf(HEADS, 1, 1, dtype=dtype)
    lookup = memory.look_up(queries, TOPK, hidden_rows)
    actual = memory_attention(queries, lookup, multiplier, **setting)
    expected = slow(queries, multiplier, gathered(memory, queries, lookup), **setting)
    assert_equal(actual, expected, tolerance)
    towards = [torch.randn_like(part) for part in expected]
    actual_grads = torch.autograd.grad(actual, (queries, multiplier), towards)
    assert_equal(actual_grads, torch.autograd.grad(expected, (queries, multiplier), towards), tolerance)
    assert float(actual_grads[0].norm()) > 0.1
    assert float(actual_grads[0][0].norm()) == 0  # the empty row
    weights = found_weights(lookup, multiplier, actual[1], **setting)
    sums = gathered_sums(weights, gathered(memory, queries, lookup).values)
    torch.testing.assert_close(sums, expected[0], atol=tolerance, rtol=tolerance)


def test_gradients_are_those_of_finite_differences() -> None:
    memory = filled_memory((2, 29), kv_heads=2)
    queries, multiplier = leaf(2, HEADS, LENGTH, DIM, dtype=torch.float64), leaf(HEADS, 1, 1, dtype=torch.float64)
    first = memory.look_up(queries, TOPK)

    def attention(queries: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        scores = gathered_logits(queries, gathered(memory, first_queries, first).keys).where(first.mask, 0)
        return memory_attention(queries, first._replace(scores=scores.detach()), multiplier, softcap=2.0)

    first_queries = queries.detach()
    assert torch.autograd.gradcheck(attention, (queries, multiplier))


@pytest.mark.parametrize(("dtype", "tolerance"), HALVES)
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float64])
def test_half_precision_stores_equal_gathering(dtype: torch.dtype, tolerance: float, query_dtype: torch.dtype) -> None:
    memory = filled_memory((2, 29), kv_heads=2, dtype=dtype)
    queries, multiplier = leaf(2, HEADS, LENGTH, DIM, dtype=query_dtype), leaf(HEADS, 1, 1, dtype=query_dtype)
    lookup = memory.look_up(queries, TOPK)
    actual = memory_attention(queries, lookup, multiplier)
    expected = slow(queries, multiplier, gathered(memory, queries, lookup))
    torch.testing.assert_close(actual[1], expected[1])  # scores are accumulated in float32 from the stored numbers
    assert relative_error(actual[0], expected[0]) < tolerance
    towards = [torch.randn_like(part) for part in expected]
    actual_grads = torch.autograd.grad(actual, (queries, multiplier), towards)
    for a, b in zip(actual_grads, torch.autograd.grad(expected, (queries, multiplier), towards), strict=True):
        assert a.dtype == query_dtype
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("query_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_queries_get_gradients_of_their_own_dtype(query_dtype: torch.dtype) -> None:
    memory = filled_memory((9, 29))
    queries, one = leaf(2, HEADS, LENGTH, DIM, dtype=query_dtype), torch.ones(HEADS, 1, 1)
    lookup = memory.look_up(queries, TOPK)
    out, lse = memory_attention(queries, lookup, one)
    assert out.dtype == lse.dtype == torch.float32
    wide = queries.detach().float().requires_grad_()
    exact = slow(wide, one, gathered(memory, wide, lookup))
    assert_equal((out, lse), exact, 1e-5)
    towards = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, queries, towards)
    assert grad.dtype == query_dtype
    assert relative_error(grad.float(), torch.autograd.grad(exact[0], wide, towards)[0]) < 2e-2


@pytest.mark.parametrize("store_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("size", [1e-8, 1e-30, 1e8])
def test_gradients_of_any_size_survive_the_dtype_of_the_store(store_dtype: torch.dtype, size: float) -> None:
    memory = filled_memory((29,), dtype=store_dtype)
    queries, multiplier = leaf(1, HEADS, LENGTH, DIM, dtype=torch.float32), leaf(HEADS, 1, 1, dtype=torch.float32)
    lookup = memory.look_up(queries, TOPK)
    expected = slow(queries, multiplier, gathered(memory, queries, lookup))
    towards = [torch.randn_like(part) for part in expected]
    actual = memory_attention(queries, lookup, multiplier)
    tiny = torch.autograd.grad(actual, (queries, multiplier), [part * size for part in towards])
    usual = torch.autograd.grad(expected, (queries, multiplier), towards)
    for a, b in zip(tiny, usual, strict=True):
        assert relative_error(a / size, b) < 1e-2


def test_large_values_do_not_overflow_a_float16_store() -> None:
    memory = KNNMemory(DIM, TOPK, dtype=torch.float16)
    memory.add(torch.full((1, TOPK, 2, DIM), 3e4))
    queries = leaf(1, 1, 1, DIM, dtype=torch.float32)
    mean, _ = memory_attention(queries, memory.look_up(queries, TOPK), torch.full((1, 1, 1), 1e-4))
    torch.testing.assert_close(mean, torch.full_like(mean, 3e4), rtol=1e-2, atol=0)
    (grad,) = torch.autograd.grad(mean.mean(), queries)
    assert bool(grad.isfinite().all())


def test_dropout_acts_on_the_weights_and_not_on_their_sum() -> None:
    memory = filled_memory((29,))
    queries, one = leaf(1, HEADS, 200, DIM, dtype=torch.float32), torch.ones(HEADS, 1, 1)
    lookup = memory.look_up(queries, TOPK)
    out, lse = memory_attention(queries, lookup, one)
    dropped, same_lse = memory_attention(queries, lookup, one, dropout=0.5)
    assert torch.equal(lse, same_lse)
    assert not torch.equal(out, dropped)
    assert bool((dropped == 0).all(dim=-1).any())  # all five of some query
    torch.testing.assert_close(dropped.mean(dim=2), out.mean(dim=2), atol=0.2, rtol=0)
    weights = found_weights(lookup, one, lse)
    values = gathered(memory, queries, lookup).values
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(torch.ones_like(lookup.scores), 0.5)
    torch.manual_seed(3)
    actual, _ = memory_attention(queries, lookup, one, dropout=0.5)
    torch.testing.assert_close(actual, gathered_sums(weights * kept, values))


@pytest.mark.parametrize("table_dtype", [torch.float64, torch.float32])
def test_the_two_operations_are_accurate_in_float64(table_dtype: torch.dtype) -> None:
    table = torch.randn(13, DIM).to(table_dtype)
    slots = torch.randint(13, (2, LENGTH, TOPK))
    vectors, weights = (torch.randn(2, LENGTH, n, dtype=torch.float64) for n in (DIM, TOPK))
    copies = table[slots].double()
    products, sums = sampled_inner_products(vectors, table, slots), weighted_sums(weights, table, slots)
    torch.testing.assert_close(products, torch.einsum("btd,btkd->btk", vectors, copies), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(sums, torch.einsum("btk,btkd->btd", weights, copies), atol=1e-10, rtol=1e-10)


def test_the_memory_gets_no_gradient() -> None:
    memory = KNNMemory(DIM, 11)
    pairs, multiplier = leaf(1, 6, 2, DIM, dtype=torch.float32), leaf(1, 1, 1, dtype=torch.float32)
    memory.add(pairs)
    queries = leaf(1, 1, LENGTH, DIM, dtype=torch.float32)
    out, lse = memory_attention(queries, memory.look_up(queries, TOPK), multiplier)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (pairs, queries, multiplier), allow_unused=True)
    assert [grad is None for grad in grads] == [True, False, False]


def turn_the_ring(memory: KNNMemory) -> None:
    for count in (1, 4, 9, 30):
        memory.add(torch.randn(memory.num_indices, memory.num_kv_heads, count, 2, DIM))


def clear_and_refill(memory: KNNMemory) -> None:
    memory.clear()
    turn_the_ring(memory)


def forget_some(memory: KNNMemory) -> None:
    for document in range(3):
        memory.forget([document])
        turn_the_ring(memory)


CHANGES = [turn_the_ring, clear_and_refill, forget_some]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("frozen", ["queries", "multiplier"])
def test_backward_after_changes_is_right_for_whatever_is_trained(
    change: Callable[[KNNMemory], None], frozen: str
) -> None:
    memory = filled_memory((2, 29), kv_heads=2)
    queries, multiplier = leaf(2, HEADS, LENGTH, DIM, dtype=torch.float32), leaf(HEADS, 1, 1, dtype=torch.float32)
    trained = multiplier if frozen == "queries" else queries
    (queries if frozen == "queries" else multiplier).requires_grad_(False)
    lookup = memory.look_up(queries, TOPK)
    expected = slow(queries, multiplier, gathered(memory, queries, lookup))[0]
    actual, _ = memory_attention(queries, lookup, multiplier)
    towards = torch.randn_like(expected)
    for _ in range(2):  # and again, after still more changes
        change(memory)
        (actual_grad,) = torch.autograd.grad(actual, trained, towards, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected, trained, towards, retain_graph=True)
        torch.testing.assert_close(actual_grad, expected_grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("store_dtype", "tolerance"), [(torch.float32, 1e-6), (torch.int8, 1e-6), *HALVES])
def test_backward_is_right_after_any_sequence_of_calls(seed: int, store_dtype: torch.dtype, tolerance: float) -> None:
    choices = random.Random(seed)
    memory = filled_memory((2, 29, 6), kv_heads=2, dtype=store_dtype)
    queries, multiplier = leaf(3, HEADS, LENGTH, DIM, dtype=torch.float32), leaf(HEADS, 1, 1, dtype=torch.float32)
    actual, expected, towards = [], [], []
    for _ in range(40):
        rows = choices.sample(range(3), choices.randint(1, 3))
        call = choices.choice(["add", "add", "look up", "clear", "forget"])
        with memory.at_batch_indices(rows):
            if call == "add":
                count = choices.randint(0, 13)
                origins = torch.randint(4, (len(rows), count, 3))
                mask = torch.rand(len(rows), count) < 0.8
                memory.add(torch.randn(len(rows), 2, count, 2, DIM), mask, origins)
            elif call == "clear" and choices.random() < 0.3:
                memory.clear(rows[0])
            elif call == "forget":
                memory.forget([choices.randrange(4)])
            elif call == "look up":
                lookup = memory.look_up(queries[rows], TOPK)
                actual += memory_attention(queries[rows], lookup, multiplier)
                expected += slow(queries[rows], multiplier, gathered(memory, queries[rows], lookup))
                towards += [torch.randn_like(part) for part in expected[-2:]]
    assert len(actual) > 6
    actual_grads = torch.autograd.grad(actual, (queries, multiplier), towards)
    expected_grads = torch.autograd.grad(expected, (queries, multiplier), towards)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        assert relative_error(a, b) < tolerance


def test_a_look_up_ends_with_its_backward_pass() -> None:
    memory = filled_memory((29,))
    queries = leaf(1, HEADS, LENGTH, DIM, dtype=torch.float32)
    out, lse = memory_attention(queries, memory.look_up(queries, TOPK), torch.ones(1))
    loss = out.sum() + lse.sum()
    assert memory.store.log.is_read
    loss.backward()
    assert not memory.store.log.is_read  # although the loss, and so the graph, is still there


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_is_compiled_whole_with_its_search_and_keeps_what_it_found(backend: str) -> None:
    memory = filled_memory((11, 29), kv_heads=2)

    def attention(queries: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        return memory_attention(queries, memory.look_up(queries, TOPK), multiplier)

    queries, multiplier = leaf(2, HEADS, LENGTH, DIM, dtype=torch.float32), leaf(HEADS, 1, 1, dtype=torch.float32)
    expected = attention(queries, multiplier)
    actual = torch.compile(attention, fullgraph=True, backend=backend)(queries, multiplier)
    assert_equal(actual, expected, 1e-5)
    turn_the_ring(memory)
    towards = [torch.randn_like(part) for part in expected]
    expected_grads = torch.autograd.grad(expected, (queries, multiplier), towards)
    assert_equal(torch.autograd.grad(actual, (queries, multiplier), towards), expected_grads, 1e-5)
    del expected, actual
    assert not memory.store.log.is_read


def test_pytorch_finds_nothing_wrong_with_the_operator() -> None:
    memory = filled_memory((11,))
    queries = leaf(1, HEADS, LENGTH, DIM, dtype=torch.float32)
    found = memory.look_up(queries, TOPK)
    arguments = (queries, leaf(1, dtype=torch.float32), *found, None, None, 2.0)
    torch.library.opcheck(torch.ops.memorizing_transformers.memory_attention.default, arguments)


def test_gradients_under_dropout_are_those_of_the_weights_that_were_kept() -> None:
    memory = filled_memory((2, 29))
    queries, multiplier = leaf(2, HEADS, LENGTH, DIM, dtype=torch.float64), leaf(HEADS, 1, 1, dtype=torch.float64)
    lookup = memory.look_up(queries, TOPK)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(torch.ones_like(lookup.scores), 0.5)
    torch.manual_seed(3)
    actual, _ = memory_attention(queries, lookup, multiplier, dropout=0.5)
    found = gathered(memory, queries, lookup)
    logits = (gathered_logits(queries, found.keys) * multiplier).masked_fill(~found.mask, -torch.inf)
    expected = gathered_sums(logits.softmax(dim=-1) * kept, found.values)
    towards = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, (queries, multiplier), towards) for out in (actual, expected)]
    assert_equal(*grads, 1e-10)
