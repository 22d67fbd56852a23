"""Logits and sums over retrieved entries equal those over gathered copies, however late their backward pass comes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch.attention.retrieval import (
    retrieved_logits,
    retrieved_values,
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


def fast(queries: Tensor, weights: Tensor, lookup: Lookup) -> tuple[Tensor, Tensor]:
    """Logits and sums as an attention layer asks for them: where nothing was found, both must not count."""
    logits = retrieved_logits(queries, lookup).where(lookup.mask, 0)
    return logits, retrieved_values(weights.where(lookup.mask, 0), lookup)


def slow(queries: Tensor, weights: Tensor, found: Found) -> tuple[Tensor, Tensor]:
    """The same from gathered copies."""
    logits = gathered_logits(queries, found.keys).where(found.mask, 0)
    return logits, gathered_sums(weights.where(found.mask, 0), found.values)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("store_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [FLOAT64, FLOAT32])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("hidden_rows", [None, torch.tensor([False, False, False, True])])
def test_results_and_gradients_equal_gathering(
    dtype: torch.dtype, tolerance: float, store_dtype: torch.dtype, kv_heads: int, hidden_rows: Tensor | None
) -> None:
    sizes = (0, 2, 11, 29)  # none, fewer than asked for, all, more than fit
    memory = filled_memory(sizes, kv_heads=kv_heads, dtype=store_dtype)
    queries, weights = leaf(4, HEADS, LENGTH, DIM, dtype=dtype), leaf(4, HEADS, LENGTH, TOPK, dtype=dtype)
    lookup = memory.look_up(queries, TOPK, hidden_rows)
    actual = fast(queries, weights, lookup)
    expected = slow(queries, weights, gathered(memory, queries, lookup))
    assert_equal(actual, expected, tolerance)
    towards = [torch.randn_like(part) for part in expected]
    actual_grads = torch.autograd.grad(actual, (queries, weights), towards)
    expected_grads = torch.autograd.grad(expected, (queries, weights), towards)
    assert_equal(actual_grads, expected_grads, tolerance)
    assert float(expected_grads[0].norm()) > 1
    assert float(actual_grads[0][0].norm()) == 0  # the empty row


@pytest.mark.parametrize(("dtype", "tolerance"), HALVES)
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float64])
def test_half_precision_stores_equal_gathering(dtype: torch.dtype, tolerance: float, query_dtype: torch.dtype) -> None:
    memory = filled_memory((2, 29), kv_heads=2, dtype=dtype)
    queries, weights = (leaf(2, HEADS, LENGTH, n, dtype=query_dtype) for n in (DIM, TOPK))
    lookup = memory.look_up(queries, TOPK)
    actual = fast(queries, weights, lookup)
    expected = slow(queries, weights, gathered(memory, queries, lookup))
    torch.testing.assert_close(actual[0], expected[0])  # scores are accumulated in float32 from the stored numbers
    assert relative_error(actual[1], expected[1]) < tolerance
    towards = [torch.randn_like(part) for part in expected]
    actual_grads = torch.autograd.grad(actual, (queries, weights), towards)
    expected_grads = torch.autograd.grad(expected, (queries, weights), towards)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        assert a.dtype == query_dtype
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("query_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_queries_get_gradients_of_their_own_dtype(query_dtype: torch.dtype) -> None:
    memory = filled_memory((9, 29))
    queries, weights = leaf(2, HEADS, LENGTH, DIM, dtype=query_dtype), leaf(2, HEADS, LENGTH, TOPK, dtype=torch.float32)
    lookup = memory.look_up(queries, TOPK)
    logits, sums = fast(queries, weights, lookup)
    assert logits.dtype == sums.dtype == torch.float32
    found = gathered(memory, queries, lookup)
    exact = gathered_logits(queries.float(), found.keys.float())
    torch.testing.assert_close(logits, exact, atol=0.05, rtol=0)  # copies in the dtype of the queries are rounded
    (grad,) = torch.autograd.grad(logits, queries, torch.ones_like(logits))
    assert grad.dtype == query_dtype
    assert relative_error(grad.float(), found.keys.float().sum(dim=-2)) < 2e-2


@pytest.mark.parametrize("store_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("size", [1e-8, 1e-30, 1e8])
def test_gradients_of_any_size_survive_the_dtype_of_the_store(store_dtype: torch.dtype, size: float) -> None:
    memory = filled_memory((29,), dtype=store_dtype)
    queries, weights = (
        leaf(1, HEADS, LENGTH, DIM, dtype=torch.float32),
        leaf(1, HEADS, LENGTH, TOPK, dtype=torch.float32),
    )
    lookup = memory.look_up(queries, TOPK)
    expected = slow(queries, weights, gathered(memory, queries, lookup))
    towards = [torch.randn_like(part) for part in expected]
    tiny = torch.autograd.grad(fast(queries, weights, lookup), (queries, weights), [part * size for part in towards])
    usual = torch.autograd.grad(expected, (queries, weights), towards)
    for a, b in zip(tiny, usual, strict=True):
        assert relative_error(a / size, b) < 1e-2


def test_large_values_do_not_overflow_a_float16_store() -> None:
    memory = KNNMemory(DIM, TOPK, dtype=torch.float16)
    memory.add(torch.full((1, TOPK, 2, DIM), 3e4))
    queries = leaf(1, 1, 1, DIM, dtype=torch.float32)
    weights = torch.full((1, 1, 1, TOPK), 1 / TOPK, requires_grad=True)
    mean = retrieved_values(weights, memory.look_up(queries, TOPK))
    torch.testing.assert_close(mean, torch.full_like(mean, 3e4), rtol=1e-2, atol=0)
    (grad,) = torch.autograd.grad(mean.mean(), weights)
    torch.testing.assert_close(grad, torch.full_like(grad, 3e4), rtol=1e-2, atol=0)


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
    pairs, weights = leaf(1, 6, 2, DIM, dtype=torch.float32), leaf(1, 1, LENGTH, TOPK, dtype=torch.float32)
    memory.add(pairs)
    queries = leaf(1, 1, LENGTH, DIM, dtype=torch.float32)
    logits, sums = fast(queries, weights, memory.look_up(queries, TOPK))
    grads = torch.autograd.grad((logits.sum(), sums.sum()), (pairs, queries, weights), allow_unused=True)
    assert [grad is None for grad in grads] == [True, False, False]


def turn_the_ring(memory: KNNMemory) -> None:
    for count in (1, 4, 9, 30):
        memory.add(torch.randn(memory.num_indices, memory.num_kv_heads, count, 2, DIM))


def clear_and_refill(memory: KNNMemory) -> None:
    memory.clear()
    turn_the_ring(memory)


@pytest.mark.parametrize("change", [turn_the_ring, clear_and_refill])
@pytest.mark.parametrize("frozen", ["queries", "weights"])
def test_backward_after_changes_is_right_for_whatever_is_trained(
    change: Callable[[KNNMemory], None], frozen: str
) -> None:
    memory = filled_memory((2, 29), kv_heads=2)
    queries, weights = (leaf(2, HEADS, LENGTH, n, dtype=torch.float32) for n in (DIM, TOPK))
    trained = weights if frozen == "queries" else queries
    (queries if frozen == "queries" else weights).requires_grad_(False)
    lookup = memory.look_up(queries, TOPK)
    expected = slow(queries, weights, gathered(memory, queries, lookup))[frozen == "queries"]
    actual = fast(queries, weights, lookup)[frozen == "queries"]
    towards = torch.randn_like(expected)
    for _ in range(2):  # and again, after still more changes
        change(memory)
        actual_grads = torch.autograd.grad(actual, trained, towards, retain_graph=True)
        assert_equal(actual_grads, torch.autograd.grad(expected, trained, towards, retain_graph=True), 1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("store_dtype", "tolerance"), [(torch.float32, 1e-6), (torch.int8, 1e-6), *HALVES])
def test_backward_is_right_after_any_sequence_of_calls(seed: int, store_dtype: torch.dtype, tolerance: float) -> None:
    choices = random.Random(seed)
    memory = filled_memory((2, 29, 6), kv_heads=2, dtype=store_dtype)
    queries, weights = (leaf(3, HEADS, LENGTH, n, dtype=torch.float32) for n in (DIM, TOPK))
    actual: list[Tensor] = []
    expected: list[Tensor] = []
    towards: list[Tensor] = []
    for _ in range(40):
        rows = choices.sample(range(3), choices.randint(1, 3))
        call = choices.choice(["add", "add", "look up", "clear"])
        with memory.at_batch_indices(rows):
            if call == "add":
                count = choices.randint(0, 13)
                memory.add(torch.randn(len(rows), 2, count, 2, DIM), torch.rand(len(rows), count) < 0.8)
            elif call == "clear" and choices.random() < 0.3:
                memory.clear(rows[0])
            elif call == "look up":
                lookup = memory.look_up(queries[rows], TOPK)
                actual += fast(queries[rows], weights[rows], lookup)
                found = gathered(memory, queries[rows], lookup)
                expected += slow(queries[rows], weights[rows], found)
                towards += [torch.randn_like(part) for part in expected[-2:]]
    assert len(actual) > 6
    actual_grads = torch.autograd.grad(actual, (queries, weights), towards)
    expected_grads = torch.autograd.grad(expected, (queries, weights), towards)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        assert relative_error(a, b) < tolerance
