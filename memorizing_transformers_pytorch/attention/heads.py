"""Products of queries, keys and values by head: what both kinds of attention are made of.

Shapes: B rows, H query heads, G key/value heads, T queries, P past keys, S = P + T keys, D head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from memorizing_transformers_pytorch.attention.position import INVISIBLE, causal_distances


def join_past(past: Tensor | None, pairs: Tensor) -> Tensor:
    """The pairs (B, G, P, 2, D) of the past, detached, and those of this segment, as one (B, G, S, 2, D)."""
    return pairs if past is None else torch.cat((past.detach().to(pairs), pairs), dim=2)


def local_bias(rel_pos_bias: Tensor | None, mask: Tensor | None, num_past: int, num_queries: int) -> Tensor:
    """The bias (1, H, T, S), or none, with -inf for keys ahead of the query and where mask (B, T) is False.

    A query always sees its own key, so that its weights stay defined on padding too.
    """
    device = mask.device if mask is not None else None if rel_pos_bias is None else rel_pos_bias.device
    distances = causal_distances(num_queries, num_past + num_queries, device)
    hidden = distances == INVISIBLE
    if mask is not None:
        hidden = hidden | (~F.pad(mask, (num_past, 0), value=True)[:, None] & (distances != 0))
    bias = torch.zeros(1, device=device) if rel_pos_bias is None else rel_pos_bias
    return bias.masked_fill(hidden.unsqueeze(1), -math.inf)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis, in float32 or better; (nearly) zero vectors stay as they are.

    The first key of a document, with a convolution that looks at earlier tokens only, is zero: dividing it by a tiny
    epsilon, as `F.normalize` does, would give it a gradient of 1e12.
    """
    wide = at_least_float32(x)
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / norm.masked_fill(norm < 1e-6, 1)).to(x.dtype)


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
