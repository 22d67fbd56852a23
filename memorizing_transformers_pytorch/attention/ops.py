"""Attention to entries that a search has found, without copying their keys and values out of the memory.

One operator of PyTorch, so that it is compiled together with what stands around it. The search has already computed
the inner products of queries and keys, so the gradient of the queries is a weighted sum of keys; the output is a
weighted sum of values, so the gradient of the weights are inner products with values. Both are read from the memory as
it was when it was searched: the look-up holds a lease on that state, and the lease is saved for the backward pass as
any other tensor. The memory itself gets no gradient.

Shapes: B rows, H query heads, T queries, K retrieved, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch.attention.bags import products_with_values, sums_of
from memorizing_transformers_pytorch.attention.merge import NOTHING, Part
from memorizing_transformers_pytorch.memory.lease import Lookup, lease_of


def memory_attention(
    queries: Tensor,
    found: Lookup,
    multiplier: Tensor,
    *,
    less: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Part:
    """queries (B, H, T, D), those of the look-up -> out (B, H, T, D), lse (B, H, T): see `attention.merge`.

    multiplier: of inner products, so that they become logits; broadcasts to (H, 1, 1), and may be learned.
    less: what is subtracted from logits; broadcasts to (B, 1, 1, 1), no gradient.
    softcap: bound c of logits, c * tanh(logits / c), before that. dropout: of attention weights.

    In float32 (float64 for float64 queries). Where nothing was found, out is 0.
    """
    kept = F.dropout(torch.ones_like(found.scores), dropout) if dropout else None
    # Where nothing is differentiated or compiled, PyTorch's dispatcher would only cost time.
    attend = _memory_attention if torch.is_grad_enabled() or torch.compiler.is_compiling() else _attend
    out, lse, _ = attend(
        queries, multiplier, found.slots, found.scores, found.mask, found.lease, less, kept, softcap or 0.0
    )
    return out, lse


def found_weights(
    found: Lookup, multiplier: Tensor, lse: Tensor, *, less: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The weights (B, H, T, K) of the softmax over what was found, without dropout; arguments as above."""
    logits = _logits(found.scores, multiplier, found.mask, less, softcap or 0.0)
    return (logits - lse.unsqueeze(-1)).exp() * found.mask


def _logits(scores: Tensor, multiplier: Tensor, mask: Tensor, less: Tensor | None, softcap: float) -> Tensor:
    logits = scores * multiplier
    logits = (logits / softcap).tanh() * softcap if softcap else logits
    return (logits if less is None else logits - less).masked_fill(~mask, NOTHING)


def _attend(
    queries: Tensor,
    multiplier: Tensor,
    slots: Tensor,
    scores: Tensor,
    mask: Tensor,
    lease: Tensor,
    less: Tensor | None,
    kept: Tensor | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, and the weights (B, H, T, K) before dropout, which the backward pass needs."""
    logits = _logits(scores, multiplier, mask, less, softcap)
    lse = logits.logsumexp(dim=-1).masked_fill(~mask.any(dim=-1), NOTHING)
    weights = (logits - lse.unsqueeze(-1)).exp() * mask
    held = lease_of(lease)
    with held.lock:
        out = sums_of(weights if kept is None else weights * kept, held.tables(slots, mask), of_keys=False)
    return out, lse, weights


_memory_attention = torch.library.custom_op("memorizing_transformers::memory_attention", _attend, mutates_args=())


@_memory_attention.register_fake
def _(queries: Tensor, multiplier: Tensor, slots: Tensor, scores: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return scores.new_empty(queries.shape), scores.new_empty(scores.shape[:-1]), torch.empty_like(scores)


@torch.library.custom_op("memorizing_transformers::memory_attention_backward", mutates_args=())
def _memory_attention_backward(
    of_out: Tensor,
    of_lse: Tensor,
    weights: Tensor,
    multiplier: Tensor,
    slots: Tensor,
    scores: Tensor,
    mask: Tensor,
    lease: Tensor,
    kept: Tensor | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of the queries and of the products of scores and multiplier (B, H, T, K)."""
    held = lease_of(lease)
    with held.lock:
        tables = held.tables(slots, mask)
        of_weights = products_with_values(of_out.to(scores.dtype), tables)
        if kept is not None:
            of_weights = of_weights * kept
        # Of the same rounded products, so that what is common to all of them cancels.
        means = (of_weights * weights).sum(dim=-1, keepdim=True) - of_lse.unsqueeze(-1)
        of_products = (of_weights - means) * weights
        if softcap:
            of_products = of_products * (1 - (scores * multiplier / softcap).tanh().square())
        of_queries = sums_of(of_products * multiplier, tables, of_keys=True)
    return of_queries, of_products


@_memory_attention_backward.register_fake
def _(of_out: Tensor, of_lse: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return weights.new_empty(of_out.shape), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, multiplier, slots, scores, mask, lease, _, kept, softcap = inputs
    weights = output[2]
    ctx.mark_non_differentiable(weights)
    ctx.dtype, ctx.softcap = queries.dtype, softcap
    ctx.save_for_backward(weights, multiplier, slots, scores, mask, lease, kept)


def _backward(ctx: Any, of_out: Tensor, of_lse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # which gradient checkpointing allows to read once
    multiplier, scores = saved[1], saved[3]
    of_queries, of_products = _memory_attention_backward(of_out, of_lse, *saved, ctx.softcap)
    of_multiplier = None
    if ctx.needs_input_grad[1]:
        of_multiplier = (of_products * scores).sum_to_size(multiplier.shape).to(multiplier.dtype)
    return of_queries.to(ctx.dtype), of_multiplier, *[None] * 7


_memory_attention.register_autograd(_backward, setup_context=_save)
