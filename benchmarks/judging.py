"""How much of what should be found a contestant finds, judged alike for all of them: nothing but PyTorch is used."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLED = 256
SAME_SCORE = 1e-5  # by which two inner products of float32 may differ, relative to the best, and be the same


def sampled(queries: Tensor) -> Tensor:
    """Some of the queries (..., D) of a segment, evenly spread, as (q, D)."""
    flat = queries.reshape(-1, queries.shape[-1])
    return flat[torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat))).round().long()]


def recall(scores: Tensor, queries: Tensor, keys: Tensor) -> float:
    """The share of found scores (q, K) that are as good as the K best of all keys (N, D) for these queries (q, D)."""
    best = (queries @ keys.T).topk(scores.shape[1]).values
    worst = best[:, -1:] - SAME_SCORE * best.abs().amax(dim=1, keepdim=True)
    return float((scores >= worst).float().mean())
