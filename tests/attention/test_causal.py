"""Attention in blocks equals attention with all weights written down, and keeps none of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch.attention import causal
from memorizing_transformers_pytorch.attention.causal import (
    INVISIBLE,
    causal_attention,
    causal_blocks,
    causal_distances,
    causal_part,
)
from memorizing_transformers_pytorch.attention.ops import NOTHING

SIZES = [(1, 1, 1), (3, 7, 7), (2, 7, 12), (1, 130, 200)]


def inputs(
    rows: int, queries: int, keys: int, *, heads: int = 4, kv_heads: int = 2, bias_rows: int = 1
) -> list[Tensor]:
    """Queries, keys, values and bias, in float64."""
    shapes = (rows, heads, queries, 3), *[(rows, kv_heads, keys, 3)] * 2, (bias_rows, heads, queries, keys)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[3].masked_fill_((causal_distances(queries, keys) == INVISIBLE).unsqueeze(1), -torch.inf)
    return [each.requires_grad_() for each in tensors]


def written_down(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The same, with every weight."""
    shared = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(shared, dim=1).mT + bias
    return logits.softmax(dim=-1) @ v.repeat_interleave(shared, dim=1), logits.logsumexp(dim=-1)


@pytest.fixture(params=[1, 3, 128])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "QUERIES_AT_ONCE", request.param)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias_of_each", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_equal_those_of_all_weights(
    size: tuple[int, int, int], bias_of_each: bool, kv_heads: int
) -> None:
    tensors = inputs(*size, kv_heads=kv_heads, bias_rows=size[0] if bias_of_each else 1)
    found, expected = causal_part(*tensors), written_down(*tensors)
    torch.testing.assert_close(found, expected)
    directions = [torch.randn_like(each) for each in expected]
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, directions), torch.autograd.grad(expected, tensors, directions)
    )
    alone, expected = causal_attention(*tensors), written_down(*tensors)
    torch.testing.assert_close(alone, expected[0])
    torch.testing.assert_close(
        torch.autograd.grad(alone, tensors, directions[0]), torch.autograd.grad(expected[0], tensors, directions[0])
    )


@pytest.mark.usefixtures("at_once")
def test_without_gradients_it_is_the_same() -> None:
    tensors = inputs(2, 7, 12)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(*tensors), written_down(*tensors)[0])
        torch.testing.assert_close(causal_part(*tensors), written_down(*tensors))


def test_the_slow_paths_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(2, 7, 12)
    fast = *causal_part(*tensors), causal_attention(*tensors)
    monkeypatch.setattr(causal, "_fused", lambda *_: False)
    torch.testing.assert_close((*causal_part(*tensors), causal_attention(*tensors)), fast)


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    q, k, v, bias = inputs(1, 3, 3)
    with torch.no_grad():
        bias[:, :, 1] = -torch.inf
    out, lse = causal_part(q, k, v, bias)
    assert not out[:, :, 1].any()
    assert bool((lse[:, :, 1] == NOTHING).all())
    assert torch.equal(causal_attention(q, k, v, bias), out)
    gradients = torch.autograd.grad(out.sum() + lse[:, :, [0, 2]].sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in gradients)


def test_nothing_as_large_as_the_weights_is_kept_for_the_backward_pass() -> None:
    q, k, v, bias = inputs(2, 70, 90)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        causal_attention(q, k, v, bias)
        causal_part(q, k, v, bias)
    large = [tensor for tensor in kept if tensor.numel() >= q.shape[0] * q.shape[1] * 70 * 90 // 2]
    assert kept
    assert all(tensor.data_ptr() == bias.data_ptr() for tensor in large)  # which all layers share


def test_dropout_acts_on_the_weights() -> None:
    tensors = inputs(1, 9, 9)
    torch.manual_seed(0)
    out, lse = causal_part(*tensors, dropout=0.5)
    assert not torch.equal(out, causal_part(*tensors)[0])
    torch.testing.assert_close(lse, causal_part(*tensors)[1])
    assert not torch.equal(causal_attention(*tensors, dropout=0.5), causal_attention(*tensors))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("size", SIZES)
def test_blocks_cover_every_query_once_with_all_that_it_may_see(size: tuple[int, int, int]) -> None:
    _, queries, keys = size
    seen_by = {}
    for block, seen in causal_blocks(torch.zeros(1, 1, queries, 1), keys):
        for query in range(block.start, block.stop):
            assert query not in seen_by
            seen_by[query] = seen.stop
    assert set(seen_by) == set(range(queries))
    assert all(keys - queries + query < seen <= keys for query, seen in seen_by.items())
