"""Relative positions: true distances, T5 buckets, and the same numbers whether a text comes in one piece or two."""

from __future__ import annotations

import math

import pytest
import torch

from memorizing_transformers_pytorch.attention.attention import Attention
from memorizing_transformers_pytorch.attention.causal import INVISIBLE, RelativePositionBias, causal_distances
from memorizing_transformers_pytorch.attention.knn_attention import KNNAttention
from tests import reference

SIZES = [(1, 1), (5, 5), (3, 11), (7, 150)]


@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_query_i_stands_at_s_minus_t_plus_i(num_queries: int, num_keys: int) -> None:
    distances = causal_distances(num_queries, num_keys)
    expected = [[num_keys - num_queries + i - j for j in range(num_keys)] for i in range(num_queries)]
    assert distances.tolist() == [[[distance if distance >= 0 else INVISIBLE for distance in row] for row in expected]]


@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_bias_equals_a_loop_over_pairs(num_queries: int, num_keys: int) -> None:
    layer = RelativePositionBias(scale=1.7, heads=3)
    bias = layer(causal_distances(num_queries, num_keys))
    torch.testing.assert_close(bias, reference.position_bias(layer, num_queries, num_keys)[None])


def test_buckets_equal_the_t5_formula_up_to_distance_1000() -> None:
    distances = torch.arange(1001)
    assert RelativePositionBias(scale=1.0, heads=1).buckets(distances).tolist() == [
        reference.t5_bucket(distance) for distance in range(1001)
    ]


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(8, 20), (17, 50), (64, 500)])
def test_buckets_of_other_numbers_grow_from_0_to_the_last(num_buckets: int, max_distance: int) -> None:
    layer = RelativePositionBias(scale=1.0, heads=1, num_buckets=num_buckets, max_distance=max_distance)
    buckets = layer.buckets(torch.arange(2 * max_distance))
    assert bool((buckets.diff() >= 0).all())
    assert int(buckets[0]) == 0
    assert bool((buckets[max_distance:] == num_buckets - 1).all())


def test_invisible_keys_get_minus_infinity_in_each_row() -> None:
    distances = torch.tensor([[[2, 1, 0]], [[INVISIBLE, 1, 0]], [[0, INVISIBLE, INVISIBLE]]])
    bias = RelativePositionBias(scale=1.0, heads=2)(distances)
    assert bias.shape == (3, 2, 1, 3)
    assert torch.equal(bias == -math.inf, (distances == INVISIBLE)[:, None].expand_as(bias))


def test_bias_gets_a_gradient_for_each_bucket_that_occurs() -> None:
    layer = RelativePositionBias(scale=0.5, heads=2)
    bias = layer(causal_distances(3, 5))
    bias[bias.isfinite()].sum().backward()
    pairs_at_distance = torch.zeros(32)
    pairs_at_distance[:5] = torch.tensor([3.0, 3.0, 3.0, 2.0, 1.0])
    assert layer.relative_attention_bias.weight.grad is not None
    torch.testing.assert_close(
        layer.relative_attention_bias.weight.grad, 0.5 * pairs_at_distance[:, None].expand(32, 2)
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_the_gradient_equals_that_of_an_embedding(rows: int) -> None:
    layer = RelativePositionBias(scale=1.3, heads=3)
    distances = torch.randint(0, 200, (rows, 5, 17))
    weighting = torch.randn(rows, 3, 5, 17)
    layer(distances).mul(weighting).sum().backward()
    weight = layer.relative_attention_bias.weight
    embedded = torch.nn.functional.embedding(layer.buckets(distances), weight).permute(0, 3, 1, 2)
    (expected,) = torch.autograd.grad((embedded * 1.3 * weighting).sum(), weight)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [Attention, KNNAttention])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("border", [1, 4, 10])
def test_two_segments_equal_one_window(kind: type[Attention | KNNAttention], num_kv_heads: int, border: int) -> None:
    layer = kind(dim=13, heads=4, dim_head=5, num_kv_heads=num_kv_heads)
    position = RelativePositionBias(scale=2.0, heads=4)
    x = torch.randn(3, 11, 13)
    whole = layer.attend(x, bias=position(causal_distances(11, 11)))
    first = layer.attend(x[:, :border], bias=position(causal_distances(border, border)))
    second = layer.attend(x[:, border:], bias=position(causal_distances(11 - border, 11)), past=first.pairs)
    torch.testing.assert_close(torch.cat((first.out, second.out), dim=1), whole.out, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat((first.pairs, second.pairs), dim=2), whole.pairs, atol=1e-5, rtol=0)


def test_order_of_the_past_matters() -> None:
    layer, position = Attention(dim=13, heads=4, dim_head=5), RelativePositionBias(scale=2.0, heads=4)
    x, bias = torch.randn(1, 5, 13), position(causal_distances(5, 12))
    past = torch.randn(1, 1, 7, 2, 5)
    changed = (layer.attend(x, bias=bias, past=past).out - layer.attend(x, bias=bias, past=past.flip(2)).out).abs()
    assert bool((changed.amax(dim=-1) > 1e-3).all())
