"""Causal attention with a relative position bias (of the true distances between queries and keys), in blocks of queries
that do not compute what lies ahead of them.

On a CPU, where PyTorch has no fused kernel for a bias that is learned, the backward pass computes the weights of a
block anew, so that none are kept (Dao et al. 2022). On a GPU, or compiled, PyTorch's own kernels do as much.

Shapes: B rows, H query heads, G key/value heads, T queries, the last of S keys, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memorizing_transformers_pytorch.attention.ops import NOTHING, Part

QUERIES_AT_ONCE = 128
INVISIBLE = -1  # instead of a distance


def causal_blocks(queries: Tensor, num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of the queries (B, H, T, D), each with all keys that any query in it may see; on a GPU a single one."""
    count = queries.shape[2]
    size = QUERIES_AT_ONCE if queries.device.type == "cpu" else max(count, 1)
    for start in range(0, max(count, 1), size):
        stop = min(start + size, count)
        yield slice(start, stop), slice(0, num_keys - count + stop)


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """queries (B, H, T, D), keys and values (B, G, S, D), bias (B or 1, H, T, S) with -inf ahead -> (B, H, T, D).

    The logits are inner products + bias. dropout: of attention weights.
    """
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in (queries, keys, values, bias))
    if learns and _fused(queries, dropout):
        return _attend(queries, keys, values, bias)[0]
    bias = bias.to(queries.dtype)
    blocks = [
        F.scaled_dot_product_attention(
            queries[:, :, block],
            keys[:, :, seen],
            values[:, :, seen],
            attn_mask=bias[:, :, block, seen],
            dropout_p=dropout,
            scale=1.0,
            enable_gqa=keys.shape[1] != queries.shape[1],
        )
        for block, seen in causal_blocks(queries, keys.shape[2])
    ]
    return torch.cat(blocks, dim=2)


def causal_part(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, dropout: float = 0.0) -> Part:
    """`causal_attention`, with the logarithm of the sum of the exponentials of its logits; see `Part`."""
    if _fused(queries, dropout):
        return _attend(queries, keys, values, bias)
    sums, totals = [], []
    for block, seen in causal_blocks(queries, keys.shape[2]):
        logits = _logits(queries[:, :, block], keys[:, :, seen], bias[:, :, block, seen])
        sums.append(grouped_sums(F.dropout(logits.softmax(dim=-1), dropout), values[:, :, seen]))
        totals.append(logits.logsumexp(dim=-1))
    return torch.cat(sums, dim=2), torch.cat(totals, dim=2)


def _fused(queries: Tensor, dropout: float) -> bool:
    return dropout == 0 and queries.device.type == "cpu" and not torch.compiler.is_compiling()


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Part:
    apply: Any = _Attention.apply
    return cast(Part, apply(queries, keys, values, bias))


class _Attention(torch.autograd.Function):
    """Keeps for each query the logarithm of the sum of its exponentials, from which its weights are found again."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Part:
        out = torch.empty_like(queries)
        totals = at_least_float32(queries.new_empty(*queries.shape[:3], 1))
        for block, seen in causal_blocks(queries, keys.shape[2]):
            logits = _logits(queries[:, :, block], keys[:, :, seen], bias[:, :, block, seen])
            total = logits.logsumexp(dim=-1, keepdim=True).clamp_min(NOTHING)  # a query that sees nothing gets 0
            totals[:, :, block] = total
            out[:, :, block] = grouped_sums(logits.sub_(total).exp_(), values[:, :, seen])
        ctx.save_for_backward(queries, keys, values, bias, out, totals)
        return out, totals.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_totals: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, bias, out, totals = ctx.saved_tensors
        means = at_least_float32(grad * out).sum(dim=-1, keepdim=True) - grad_totals.unsqueeze(-1)
        of_queries, of_keys, of_values = (torch.zeros_like(each) for each in (queries, keys, values))
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        for block, seen in causal_blocks(queries, keys.shape[2]):
            weights = _logits(queries[:, :, block], keys[:, :, seen], bias[:, :, block, seen])
            weights.sub_(totals[:, :, block]).exp_()
            of_values[:, :, seen] += shared_sums(weights, grad[:, :, block], keys.shape[1])
            of_weights = at_least_float32(grouped_products(grad[:, :, block], values[:, :, seen]))
            of_logits = of_weights.sub_(means[:, :, block]).mul_(weights)
            if of_bias is not None:
                of_bias[:, :, block, seen] = of_logits if len(bias) > 1 else of_logits.sum(dim=0, keepdim=True)
            of_queries[:, :, block] = grouped_sums(of_logits, keys[:, :, seen])
            of_keys[:, :, seen] += shared_sums(of_logits, queries[:, :, block], keys.shape[1])
        return of_queries, of_keys, of_values, of_bias


def _logits(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """In float32 or better, so that they may be changed in place."""
    return at_least_float32(grouped_products(queries, keys)) + bias


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def grouped_products(queries: Tensor, keys: Tensor) -> Tensor:
    """queries (B, H, T, D), keys (B, G, S, D) -> inner products (B, H, T, S); H / G query heads share a key head."""
    grouped = rearrange(queries, "b (g r) t d -> b g (r t) d", g=keys.shape[1])
    return rearrange(grouped @ keys.mT, "b g (r t) s -> b (g r) t s", t=queries.shape[2])


def grouped_sums(weights: Tensor, values: Tensor) -> Tensor:
    """weights (B, H, T, S), values (B, G, S, D) -> weighted sums (B, H, T, D)."""
    grouped = rearrange(weights.to(values.dtype), "b (g r) t s -> b g (r t) s", g=values.shape[1])
    return rearrange(grouped @ values, "b g (r t) d -> b (g r) t d", t=weights.shape[2])


def shared_sums(weights: Tensor, vectors: Tensor, kv_heads: int) -> Tensor:
    """weights (B, H, T, S), vectors (B, H, T, D) -> (B, G, S, D): for each key the weighted sum over queries and the
    heads that share it."""
    grouped = rearrange(weights.to(vectors.dtype), "b (g r) t s -> b g s (r t)", g=kv_heads)
    return grouped @ rearrange(vectors, "b (g r) t d -> b g (r t) d", g=kv_heads)


def causal_distances(num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """(1, T, S) int64: how far each key lies behind each query; INVISIBLE for keys that lie ahead.

    The queries are the last T of the S positions: query i stands at S - T + i.
    """
    positions = torch.arange(num_keys, device=device)
    distances = positions[num_keys - num_queries :, None] - positions[None]
    return distances.clamp_min(INVISIBLE).unsqueeze(0)


class RelativePositionBias(nn.Module):
    """A learned bias per head and bucket of distances (T5; Raffel et al., JMLR 2020, section 2.1).

    Half of the buckets hold one distance each, the others grow logarithmically up to `max_distance`.
    """

    def __init__(self, scale: float, heads: int, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.scale = scale
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)
        nn.init.normal_(self.relative_attention_bias.weight, std=0.02)  # at 1, chance would outweigh content

    def buckets(self, distances: Tensor) -> Tensor:
        """Distances (...) of at least 0 -> their buckets (...)."""
        exact = self.num_buckets // 2
        growth = torch.log(distances.clamp_min(exact).float() / exact) / math.log(self.max_distance / exact)
        grown = exact + (growth * (self.num_buckets - exact)).long()
        return torch.where(distances < exact, distances, grown.clamp_max(self.num_buckets - 1))

    def forward(self, distances: Tensor) -> Tensor:
        """distances (B or 1, T, S) -> bias to be added to the logits (B or 1, H, T, S); -inf for INVISIBLE keys."""
        weight, buckets = self.relative_attention_bias.weight, self.buckets(distances.clamp_min(0))
        of_buckets: Any = _OfBuckets.apply if weight.device.type == "cpu" else F.embedding
        bias: Tensor = of_buckets(buckets, weight)
        bias = bias.permute(0, 3, 1, 2) * self.scale
        return bias.masked_fill((distances == INVISIBLE).unsqueeze(1), -math.inf)


class _OfBuckets(torch.autograd.Function):
    """`F.embedding` for so few embeddings that, on a CPU, its own backward pass would take several times as long."""

    @staticmethod
    def forward(ctx: Any, buckets: Tensor, weight: Tensor) -> Tensor:
        """buckets (B, T, S), weight (n, H) -> (B, T, S, H)."""
        ctx.save_for_backward(buckets)
        ctx.num_buckets = weight.shape[0]
        return F.embedding(buckets, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """The sum over all places of each bucket: first of each query and head, which can be done side by side."""
        (buckets,) = ctx.saved_tensors
        by_query = grad.permute(0, 3, 1, 2)
        sums = grad.new_zeros(*by_query.shape[:3], ctx.num_buckets)
        sums.scatter_add_(3, buckets.unsqueeze(1).expand_as(by_query), by_query)
        return None, sums.sum(dim=(0, 2)).T
