"""Relative position bias, with the true distance between a query and a key.

Shapes: B rows (or 1, where all rows are alike), H query heads, T queries, S keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

INVISIBLE = -1


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
