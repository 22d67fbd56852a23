"""The short convolution, and the start as an induction head that it makes possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch.attention.causal import RelativePositionBias, causal_distances
from memorizing_transformers_pytorch.attention.knn_attention import KNNAttention
from memorizing_transformers_pytorch.attention.short_conv import ShortConv, induction_taps
from memorizing_transformers_pytorch.memory import KNNMemory, Lookup
from tests import reference

WIDTHS = [1, 2, 4, 7]


def random_conv(channels: int, width: int) -> ShortConv:
    conv = ShortConv(channels, width)
    torch.nn.init.normal_(conv.weight)
    return conv


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("with_state", [False, True])
def test_convolution_equals_a_loop_over_tokens(width: int, length: int, with_state: bool) -> None:
    conv, x = random_conv(5, width), torch.randn(3, length, 5)
    state = torch.randn(3, width - 1, 5) if with_state else None
    torch.testing.assert_close(conv(x, state), reference.causal_convolution(x, conv.weight, state))


@pytest.mark.parametrize("width", WIDTHS)
def test_convolution_starts_as_the_identity(width: int) -> None:
    x = torch.randn(2, 9, 5)
    assert torch.equal(ShortConv(5, width)(x, torch.randn(2, width - 1, 5)), x)


@pytest.mark.parametrize("width", WIDTHS)
def test_two_segments_with_carried_state_equal_one(width: int) -> None:
    conv, x = random_conv(5, width), torch.randn(2, 13, 5)
    border = 8
    state = x[:, border - (width - 1) : border]
    parts = torch.cat((conv(x[:, :border]), conv(x[:, border:], state)), dim=1)
    torch.testing.assert_close(parts, conv(x))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("borders", [[[4], [0]], [[1, 2, 3], []], [[0, 4, 5, 8], [8]]], ids=str)
def test_a_convolution_over_packed_documents_equals_one_over_each(width: int, borders: list[list[int]]) -> None:
    """Outputs and gradients; what stands before the first border goes on from the state."""
    conv, x = random_conv(5, width), torch.randn(2, 9, 5, requires_grad=True)
    state = torch.randn(2, width - 1, 5, requires_grad=True)
    starts = torch.tensor([[t in row for t in range(9)] for row in borders])
    packed = conv(x, state, starts.cumsum(dim=1))
    expected = torch.zeros_like(packed)
    for row, places in enumerate(borders):
        for begin, end in zip([0, *places], [*places, 9], strict=True):
            before = state[row : row + 1] if begin == 0 and 0 not in places else None
            part = reference.causal_convolution(x[row : row + 1, begin:end], conv.weight, before)
            expected[row, begin:end] = part[0]
    torch.testing.assert_close(packed, expected)
    weighting, inputs = torch.randn(packed.shape), (x, state, conv.weight)
    both = [torch.autograd.grad((out * weighting).sum(), inputs, materialize_grads=True) for out in (packed, expected)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_the_convolution_are_right(width: int) -> None:
    conv = random_conv(3, width).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, width - 1, 3, dtype=torch.float64, requires_grad=True)

    def convolved(x: Tensor, state: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(conv, {"weight": weight}, (x, state))
        return result

    assert torch.autograd.gradcheck(convolved, (x, state, conv.weight))


def test_a_layer_with_carried_state_and_past_equals_one_window() -> None:
    layer = KNNAttention(dim=13, heads=4, dim_head=5, num_kv_heads=2, short_conv=4)
    assert layer.short_conv is not None
    torch.nn.init.normal_(layer.short_conv.weight)
    position = RelativePositionBias(scale=2.0, heads=4)
    x = torch.randn(3, 11, 13)
    whole = layer.attend(x, bias=position(causal_distances(11, 11)))
    first = layer.attend(x[:, :6], bias=position(causal_distances(6, 6)))
    assert first.conv_inputs is not None
    state = first.conv_inputs[:, -3:]
    second = layer.attend(x[:, 6:], bias=position(causal_distances(5, 11)), past=first.pairs, conv_state=state)
    torch.testing.assert_close(torch.cat((first.out, second.out), dim=1), whole.out, atol=1e-5, rtol=0)


def test_induction_taps_of_width_4_look_at_three_tokens() -> None:
    queries, _ = induction_taps(4)
    torch.testing.assert_close(queries, torch.tensor([0.0, 0.3, 0.5, 0.8]), atol=0.02, rtol=0)


@pytest.mark.parametrize("width", [2, 3, 4, 7])
def test_induction_taps_of_keys_are_those_of_queries_one_token_earlier(width: int) -> None:
    queries, keys = induction_taps(width)
    assert queries.shape == keys.shape == (width,)
    assert torch.equal(queries[1:], keys[:-1])
    assert float(queries[0]) == float(keys[-1]) == 0
    assert bool((queries.diff() > 0).all())


def queries_and_keys(layer: KNNAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised queries of a layer (B, H, T, D), and its keys repeated for each query head (B, H, T, D)."""
    memory, seen = KNNMemory(layer.dim_head, 1, x.shape[0], num_kv_heads=layer.num_kv_heads), []

    def look_up(queries: Tensor, topk: int) -> Lookup:
        seen.append(queries)
        return memory.look_up(queries, topk)

    pairs = layer.attend(x, bias=reference.causal_bias(x.shape[1], x.shape[1]), look_up=look_up).pairs
    return seen[0], pairs[..., 0, :].repeat_interleave(layer.heads // layer.num_kv_heads, dim=1)


@torch.no_grad()
def share_of_induction(layer: KNNAttention, *, length: int = 90, repeats: int = 60) -> float:
    """How often, over random texts that end with three tokens they have had before, the last query's best earlier key
    is that of the place right after those."""
    places = torch.randint(3, length - 3, (repeats,))
    x = torch.randn(repeats, length, layer.to_q.in_features)
    for text, place in zip(x, places.tolist(), strict=True):
        text[-3:] = text[place - 3 : place].clone()
    queries, keys = queries_and_keys(layer, x)
    best = torch.einsum("bhd,bhtd->bht", queries[:, :, -1], keys[:, :, :-1]).argmax(dim=-1)
    return float((best == places[:, None]).float().mean())


@pytest.mark.parametrize(("heads", "num_kv_heads"), [(3, 1), (4, 2), (2, 2)])
def test_an_induction_start_finds_what_followed_the_same_three_tokens(heads: int, num_kv_heads: int) -> None:
    arguments: dict[str, Any] = {
        "dim": 71,
        "heads": heads,
        "dim_head": 33,
        "num_kv_heads": num_kv_heads,
        "short_conv": 4,
    }
    assert share_of_induction(KNNAttention(**arguments, qk_init="induction")) > 0.9
    assert share_of_induction(KNNAttention(**arguments, qk_init="independent")) < 0.2


@torch.no_grad()
def test_heads_of_an_induction_start_differ() -> None:
    layer = KNNAttention(dim=71, heads=3, dim_head=33, short_conv=4, qk_init="induction")
    queries, _ = queries_and_keys(layer, torch.randn(2, 7, 71))
    assert float((queries[:, 0] - queries[:, 1]).norm(dim=-1).min()) > 0.1


@pytest.mark.parametrize("short_conv", [0, 1])
def test_an_induction_start_needs_a_convolution(short_conv: int) -> None:
    with pytest.raises(ValueError, match="short_conv"):
        KNNAttention(dim=7, heads=2, dim_head=3, short_conv=short_conv, qk_init="induction")
