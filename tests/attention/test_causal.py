"""Attention in blocks equals attention with all weights written down, and keeps none of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch.attention import causal
from memorizing_transformers_pytorch.attention.causal import causal_attention, causal_blocks, joint_attention
from memorizing_transformers_pytorch.attention.position import INVISIBLE, causal_distances

SIZES = [(1, 1, 1), (3, 7, 7), (2, 7, 12), (1, 130, 200)]


def inputs(
    rows: int, queries: int, keys: int, *, heads: int = 4, kv_heads: int = 2, bias_rows: int = 1
) -> list[Tensor]:
    """Queries, keys, values, bias and the logits of five others, in float64."""
    shapes = (rows, heads, queries, 3), *[(rows, kv_heads, keys, 3)] * 2, (bias_rows, heads, queries, keys)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in (*shapes, (rows, heads, queries, 5))]
    tensors[3].masked_fill_((causal_distances(queries, keys) == INVISIBLE).unsqueeze(1), -torch.inf)
    return [each.requires_grad_() for each in tensors]


def written_down(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The same, with every weight."""
    shared = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(shared, dim=1).mT + bias
    weights = torch.cat((others, logits), dim=-1).softmax(dim=-1)
    of_others = weights[..., : others.shape[-1]]
    return weights[..., others.shape[-1] :] @ v.repeat_interleave(shared, dim=1), of_others


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
    found, expected = joint_attention(*tensors), written_down(*tensors)
    torch.testing.assert_close(found, expected)
    directions = [torch.randn_like(each) for each in expected]
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, directions), torch.autograd.grad(expected, tensors, directions)
    )
    alone, nothing = causal_attention(*tensors[:4]), tensors[4][..., :0]
    expected = written_down(*tensors[:4], nothing)
    torch.testing.assert_close(alone, expected[0])
    torch.testing.assert_close(
        torch.autograd.grad(alone, tensors[:4], directions[0]),
        torch.autograd.grad(expected[0], tensors[:4], directions[0]),
    )


@pytest.mark.usefixtures("at_once")
def test_without_gradients_it_is_the_same() -> None:
    tensors = inputs(2, 7, 12)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(*tensors[:4]), written_down(*tensors[:4], tensors[4][..., :0])[0])
        torch.testing.assert_close(joint_attention(*tensors), written_down(*tensors))


def test_the_slow_paths_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(2, 7, 12)
    fast = joint_attention(*tensors)[0], causal_attention(*tensors[:4])
    monkeypatch.setattr(causal, "_fused", lambda *_: False)
    torch.testing.assert_close((joint_attention(*tensors)[0], causal_attention(*tensors[:4])), fast)


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    q, k, v, bias, others = inputs(1, 3, 3)
    with torch.no_grad():
        bias[:, :, 1] = -torch.inf
    out = causal_attention(q, k, v, bias)
    assert not out[:, :, 1].any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
    assert joint_attention(q, k, v, bias, others)[1][:, :, 1].sum(dim=-1).allclose(torch.ones(1, dtype=torch.float64))


def test_nothing_as_large_as_the_weights_is_kept_for_the_backward_pass() -> None:
    q, k, v, bias, others = inputs(2, 70, 90)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        causal_attention(q, k, v, bias)
        joint_attention(q, k, v, bias, others)
    large = [tensor for tensor in kept if tensor.numel() >= q.shape[0] * q.shape[1] * 70 * 90 // 2]
    assert kept
    assert all(tensor.data_ptr() == bias.data_ptr() for tensor in large)  # which all layers share


def test_dropout_acts_on_the_weights() -> None:
    tensors = inputs(1, 9, 9)
    torch.manual_seed(0)
    out, of_others = joint_attention(*tensors, dropout=0.5)
    assert bool((of_others == 0).any())
    assert not torch.equal(out, joint_attention(*tensors)[0])
    assert not torch.equal(causal_attention(*tensors[:4], dropout=0.5), causal_attention(*tensors[:4]))


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
