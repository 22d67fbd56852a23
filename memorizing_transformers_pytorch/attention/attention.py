"""Attention over a segment and its past, and the pre-norm residual blocks that a layer is made of.

Layers compute; they do not keep. `attend` takes what came before as `past` and returns the pairs of this segment; who
stores them where is the caller's business (the model's, or that of `forward` for a layer used on its own).

Shapes: B rows, H query heads, G key/value heads, T queries, P past keys, S = P + T keys, K retrieved, D head width,
E model width. Pairs are (B, G, n, 2, D): keys at [..., 0, :], values at [..., 1, :].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memorizing_transformers_pytorch.attention.causal import INVISIBLE, causal_attention, causal_distances
from memorizing_transformers_pytorch.attention.ops import found_weights
from memorizing_transformers_pytorch.memory.lease import Lookup

Search = Callable[[Tensor, int], Lookup]
"""A search with queries (B, H, T, D) for so many entries each."""


class Reading(NamedTuple):
    """What a layer read in its memory, without gradient: queries (B, H, T, D) and what each found; of that the
    multiplier and lse of `memory_attention`, and its share (B, H, T, 1) of all attention. The model packs padded rows
    to the left first."""

    queries: Tensor
    lookup: Lookup
    multiplier: Tensor
    lse: Tensor
    share: Tensor

    @property
    def weights(self) -> Tensor:
        """The attention (B, H, T, K) on what was found, without dropout."""
        return found_weights(self.lookup, self.multiplier, self.lse) * self.share


class Attended(NamedTuple):
    """out (B, T, E), the pairs of this segment (B, G, T, 2, D), the inputs of the convolution (B, T, C) if any, and
    what was read in the memory if one was searched (for forward hooks; nothing else uses it)."""

    out: Tensor
    pairs: Tensor
    conv_inputs: Tensor | None = None
    reading: Reading | None = None


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


class AttentionBase(nn.Module):
    """The projections of both kinds of attention, and their dealings with the past when used on their own."""

    out_bias: ClassVar[bool] = True

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        xl_max_memories: int = 0,
        num_kv_heads: int = 1,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or heads % num_kv_heads != 0:
            raise ValueError(f"expected heads to be a multiple of num_kv_heads={num_kv_heads}, got {heads}")
        self.heads = heads
        self.num_kv_heads = num_kv_heads
        self.dim_head = dim_head
        self.xl_max_memories = xl_max_memories
        self.dropout = nn.Dropout(dropout)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * num_kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=self.out_bias)

    def _local_bias(
        self, x: Tensor, xl_memory: Tensor | None, rel_pos_bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """The bias of a layer used on its own. Raises ValueError for a mask or past that cannot be used."""
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(f"expected a bool mask {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        if mask is not None and self.xl_max_memories > 0:
            raise ValueError("expected no mask with xl_max_memories (only the model carries masks on), got one")
        num_past = 0 if xl_memory is None else xl_memory.shape[2]
        expected = (x.shape[0], self.num_kv_heads, num_past, 2, self.dim_head)
        if xl_memory is not None and xl_memory.shape != expected:
            raise ValueError(f"expected xl_memory {expected}, got {tuple(xl_memory.shape)}")
        return local_bias(rel_pos_bias, mask, num_past, x.shape[1]).to(x.device)

    def _roll(self, xl_memory: Tensor | None, pairs: Tensor) -> tuple[Tensor | None, Tensor]:
        """The new XL memory, and the pairs that it no longer holds; without one, the pairs of this segment alone."""
        if self.xl_max_memories == 0:
            return None, pairs.detach()
        pairs = join_past(xl_memory, pairs).detach()
        kept = min(self.xl_max_memories, pairs.shape[2])
        return pairs[:, :, pairs.shape[2] - kept :], pairs[:, :, : pairs.shape[2] - kept]


class Attention(AttentionBase):
    """Causal attention over the segment and its past (Vaswani et al. 2017), with shared key/value heads (Shazeer 2019).

    dim, heads, dim_head, dropout: widths E, H, D and the dropout of attention weights.
    xl_max_memories: how many of the last pairs `forward` gives back as Transformer-XL memory.
    num_kv_heads: key/value heads G, a divisor of heads; 1 is multi-query attention.
    """

    def attend(self, x: Tensor, *, bias: Tensor, past: Tensor | None = None) -> Attended:
        """x (B, T, E), bias (B or 1, H, T, S) with -inf for invisible keys, past (B, G, P, 2, D)."""
        queries = rearrange(self.to_q(x), "b t (h d) -> b h t d", h=self.heads)
        pairs = rearrange(self.to_kv(x), "b t (kv g d) -> b g t kv d", kv=2, g=self.num_kv_heads)
        keys, values = join_past(past, pairs).unbind(dim=-2)
        queries = queries * self.dim_head**-0.5
        out = causal_attention(queries, keys, values, bias, self.dropout.p if self.training else 0.0)
        return Attended(self.to_out(rearrange(out, "b h t d -> b t (h d)")), pairs)

    def forward(
        self,
        x: Tensor,
        *,
        xl_memory: Tensor | None = None,
        rel_pos_bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer on its own: x (B, T, E), xl_memory (B, G, P, 2, D) -> out (B, T, E) and the new XL memory, if any.

        rel_pos_bias: (1, H, T, S), without a causal mask; keys ahead of a query are masked here.
        mask: (B, T) bool, False for padding; not together with xl_max_memories.
        """
        bias = self._local_bias(x, xl_memory, rel_pos_bias, mask)
        attended = self.attend(x, bias=bias, past=xl_memory)
        new_xl_memory, _ = self._roll(xl_memory, attended.pairs)
        return attended.out, new_xl_memory


class AttentionBlock(nn.Module):
    """x + attention(norm(x)). fn: an `Attention` or a `KNNAttention`."""

    def __init__(self, dim: int, fn: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, **context: Any) -> Attended:
        """x (B, T, E) and what `attend` of the layer takes."""
        attended: Attended = self.fn.attend(self.norm(x), **context)
        return attended._replace(out=x + attended.out)


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, dim * mult), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim * mult, dim))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


class FeedForwardBlock(nn.Module):
    """x + feed_forward(norm(x))."""

    def __init__(self, dim: int, fn: FeedForward) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.fn(self.norm(x)))
