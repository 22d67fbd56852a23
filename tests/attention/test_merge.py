"""Attention to keys in several places, merged, equals attention to all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch.attention.ops import NOTHING, gated, merged, shares


def part(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    logits = queries @ keys.mT
    return logits.softmax(dim=-1) @ values, logits.logsumexp(dim=-1)


@pytest.mark.parametrize("sizes", [(1,), (3, 4), (1, 5, 2), (7, 1, 1, 3)])
def test_outputs_and_gradients_equal_those_over_all_keys(sizes: tuple[int, ...]) -> None:
    queries, keys, values = (torch.randn(2, 3, n, 4).double().requires_grad_() for n in (5, sum(sizes), sum(sizes)))
    found = merged([part(queries, *each) for each in zip(keys.split(sizes, 2), values.split(sizes, 2), strict=True)])
    expected = part(queries, keys, values)
    torch.testing.assert_close(found, expected)
    towards = [torch.randn_like(each) for each in expected]
    inputs = (queries, keys, values)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, towards), torch.autograd.grad(expected, inputs, towards)
    )


@pytest.mark.parametrize("empty", [1, 2])
def test_parts_without_keys_change_nothing(empty: int) -> None:
    queries, keys, values = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    whole = part(queries, keys, values)
    nothing = [(torch.zeros(1, 2, 3, 4), torch.full((1, 2, 3), NOTHING, requires_grad=True)) for _ in range(empty)]
    out, total = merged([*nothing, whole])
    assert torch.equal(out, whole[0])
    assert torch.equal(total, whole[1])
    gradients = torch.autograd.grad(out.sum() + total.sum(), (queries, keys, values, nothing[0][1]))
    assert all(each.isfinite().all() for each in gradients)
    assert not gradients[-1].any()


def test_nothing_at_all_gives_zero_and_finite_gradients() -> None:
    lse = torch.full((1, 2, 3), NOTHING, requires_grad=True)
    out, total = merged([(torch.zeros(1, 2, 3, 4), lse), (torch.zeros(1, 2, 3, 4), lse)])
    assert not out.any()
    assert bool((total <= NOTHING / 2).all())
    (gradient,) = torch.autograd.grad(out.sum() + total.sum(), lse)
    assert bool(gradient.isfinite().all())


def test_shares_add_up_to_one() -> None:
    parts = [(torch.zeros(1, 2, 5, 4), lse) for lse in torch.randn(3, 1, 2, 5) * 90]
    torch.testing.assert_close(sum(shares(parts)), torch.ones(1, 2, 5, 1))


def test_a_gate_gives_all_to_what_is_local_where_nothing_was_found() -> None:
    local, out, gate = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), torch.tensor([-1.0, 2.0]).view(2, 1, 1)
    lse = torch.tensor([0.5, NOTHING, -80.0]).expand(1, 2, 3)
    found = gated(local, (out, lse), gate)
    expected = local + gate.sigmoid() * (out - local)
    torch.testing.assert_close(found[:, :, [0, 2]], expected[:, :, [0, 2]])
    assert torch.equal(found[:, :, 1], local[:, :, 1])
