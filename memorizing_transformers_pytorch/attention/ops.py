"""Attention to entries that a search has found, without copying their keys and values out of the memory; and its merge
with attention to other keys into one softmax, or by a gate.

Attention to some keys is a pair: the mean of their values under a softmax over them, and the logarithm of the sum of
the exponentials of their logits (lse). The lse says how much the mean weighs beside others (Milakov and Gimelshein
2018; the same merge as in blockwise and ring attention).

`memory_attention` is one operator of PyTorch, so that it is compiled together with what stands around it. The search
has already computed the inner products of queries and keys, so the gradient of the queries is a weighted sum of keys;
the output is a weighted sum of values, so the gradient of the weights are inner products with values. Both are read
from the memory as it was when it was searched: the look-up holds a lease on that state, and the lease is saved for the
backward pass as any other tensor. The memory itself gets no gradient. Nothing of size T * K * D is ever made: where
entries must be converted (codes, or for float64), each of them is once, however often it was retrieved.

Shapes: B rows, H query heads, T queries, K retrieved, D head width, N slots in a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch.kernels import available
from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.lease import Lookup, Table, lease_of

NOTHING = torch.finfo(torch.float32).min  # the lse of no keys: unlike minus infinity it has gradients

Part = tuple[Tensor, Tensor]
"""out (B, H, T, D) and lse (B, H, T), NOTHING where a query sees no key of this part."""


def merged(parts: Sequence[Part]) -> Part:
    """Attention to all keys of the parts together."""
    first, *others = [out * share for (out, _), share in zip(parts, shares(parts), strict=True)]
    return sum(others, start=first), torch.stack([lse for _, lse in parts]).logsumexp(dim=0)


def shares(parts: Sequence[Part]) -> list[Tensor]:
    """(B, H, T, 1) for each part: how much of the whole attention goes to its keys."""
    return list(torch.stack([lse for _, lse in parts]).softmax(dim=0).unsqueeze(-1).unbind())


def gated(local: Tensor, found: Part, gate: Tensor) -> Tensor:
    """The paper's gate (Wu et al. 2022, section 3.1) between what is local and what was found, each (B, H, T, D).

    gate: (H, 1, 1) logits of the share of what was found; where nothing was, all is local.
    """
    out, lse = found
    of_found = gate.sigmoid() * (lse > NOTHING / 2).unsqueeze(-1)
    return local * (1 - of_found) + out * of_found


def memory_attention(
    queries: Tensor,
    found: Lookup,
    multiplier: Tensor,
    *,
    less: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Part:
    """queries (B, H, T, D), those of the look-up -> out (B, H, T, D), lse (B, H, T): a `Part`.

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


def sums_of(weights: Tensor, tables: list[Table], *, of_keys: bool) -> Tensor:
    """weights (B, H, T, K), 0 where nothing was found -> sums of the found keys or values (B, H, T, D)."""
    parts = [weighted_sums(_within(weights, each), *_floats(each, of_keys)) for each in tables]
    return sum(parts[1:], start=parts[0])


def products_with_values(vectors: Tensor, tables: list[Table]) -> Tensor:
    """vectors (B, H, T, D) -> inner products with the found values (B, H, T, K)."""
    parts = [_within(sampled_inner_products(vectors, *_floats(each, False)), each) for each in tables]
    return sum(parts[1:], start=parts[0])


def _within(numbers: Tensor, table: Table) -> Tensor:
    """The numbers (B, H, T, K) of entries in this table, 0 for those in another."""
    return numbers if table.mask is None else numbers.where(table.mask.to(numbers.device), 0)


def _floats(table: Table, of_keys: bool) -> tuple[Tensor, Tensor]:
    """The keys or values (N, D) as numbers, and the slots in them."""
    vectors = table.keys if of_keys else table.values
    return (vectors.numbers, table.slots) if vectors.scales is None else _occurring(vectors, table.slots)


def weighted_sums(weights: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """weights (..., K), table (N, D), slots (..., K) -> sums of weight times entry (..., D), as the weights are."""
    table, slots = _at_precision(table, slots, weights.dtype)
    bags = slots.reshape(-1, slots.shape[-1])
    if available(table):
        from memorizing_transformers_pytorch.kernels.bags import bag_sums

        sums = bag_sums(weights.to(table.device).reshape(bags.shape), table, bags)
        return sums.view(*slots.shape[:-1], -1).to(weights)
    scaled, total = _fit_dtype(weights, table)
    sums = F.embedding_bag(bags, table, per_sample_weights=scaled.reshape(bags.shape), mode="sum")
    return sums.view(*slots.shape[:-1], -1).to(weights) * total


def sampled_inner_products(vectors: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """vectors (..., D), table (N, D), slots (..., K) -> inner products (..., K), as the vectors are."""
    table, slots = _at_precision(table, slots, vectors.dtype)
    if available(table):
        from memorizing_transformers_pytorch.kernels.bags import bag_products

        flat = vectors.to(table.device).reshape(-1, vectors.shape[-1])
        return bag_products(flat, table, slots.reshape(-1, slots.shape[-1])).view(slots.shape).to(vectors)
    if table.is_cuda and table.dtype == torch.bfloat16:  # PyTorch has no such function for them there
        table, slots = _occurring(Vectors(table), slots, torch.float32)
    scaled, total = _fit_dtype(vectors, table)
    num_bags, bag_size = slots.shape[:-1].numel(), slots.shape[-1]
    offsets = torch.arange(num_bags, device=table.device) * bag_size
    bag_of_slot = torch.arange(num_bags, device=table.device).repeat_interleave(bag_size)
    # This is how PyTorch itself differentiates embedding_bag by its per-sample weights; mode 0 is "sum".
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        scaled.reshape(num_bags, -1), table, slots.reshape(-1), offsets, bag_of_slot, 0, -1
    )
    return products.view(slots.shape).to(vectors) * total  # type: ignore[no-any-return]


def _at_precision(table: Tensor, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For float64 numbers, the entries that occur in float64, and the slots within them."""
    if dtype != torch.float64 or table.dtype == torch.float64:
        return table, slots.to(table.device)
    return _occurring(Vectors(table), slots, torch.float64)


def _occurring(vectors: Vectors, slots: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The entries that occur, each once, as floating-point numbers (of this dtype), and the slots within them."""
    used, slots = slots.to(vectors.device).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return vectors.at(used).floats(dtype), slots


def _fit_dtype(numbers: Tensor, table: Tensor) -> tuple[Tensor, Tensor | float]:
    """The numbers (..., n) in the dtype of the table; where that has a narrower range, scaled so that their absolute
    values add up to 1: no sum is then larger than the largest number in the table."""
    if numbers.dtype == table.dtype or table.dtype in (torch.float32, torch.float64):
        return numbers.to(table), 1.0
    total = numbers.abs().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(numbers.dtype).tiny)
    return (numbers / total).to(table), total
