"""Local attention, and local attention joined with entries retrieved from a memory.

Layers compute; they do not keep. `attend` takes what came before as `past` and returns the pairs of this segment; who
stores them where is the caller's business (the model's, or that of `forward` for a layer used on its own).

Shapes: B rows, H query heads, G key/value heads, T queries, P past keys, S = P + T keys, K retrieved, D head width,
E model width. Pairs are (B, G, n, 2, D): keys at [..., 0, :], values at [..., 1, :].
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memorizing_transformers_pytorch.nn.heads import (
    at_least_float32,
    grouped_products,
    grouped_sums,
    join_past,
    local_bias,
    unit,
)
from memorizing_transformers_pytorch.nn.retrieval import LookUp, Lookup, Memory, retrieved_logits, retrieved_values
from memorizing_transformers_pytorch.nn.short_conv import ShortConv, induction_taps

# The query heads of an induction start differ from the key projection by this share of their own random start.
INDUCTION_NOISE = 0.3


class Reading(NamedTuple):
    """What a layer read in its memory, without gradient: queries (B, H, T, D), what each found, and the attention
    weights (B, H, T, K) on that, after the gate and dropout. The model packs padded rows to the left first."""

    queries: Tensor
    lookup: Lookup
    weights: Tensor


class Attended(NamedTuple):
    """out (B, T, E), the pairs of this segment (B, G, T, 2, D), the inputs of the convolution (B, T, C) if any, and
    what was read in the memory if one was searched (for forward hooks; nothing else uses it)."""

    out: Tensor
    pairs: Tensor
    conv_inputs: Tensor | None = None
    reading: Reading | None = None


class _AttentionBase(nn.Module):
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


class Attention(_AttentionBase):
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
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=bias.to(queries.dtype),
            dropout_p=self.dropout.p if self.training else 0.0,
            enable_gqa=self.num_kv_heads != self.heads,
        )
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


class KNNAttention(_AttentionBase):
    """Attention over the segment, its past, and the K best entries of a memory (Wu et al., ICLR 2022, section 3.1).

    Queries and keys are l2-normalised, with a learned temperature per head (Henry et al. 2020) that starts at
    `attn_scale_init`. The same query serves local keys and the memory; retrieved keys get no position bias.

    combine: "softmax", one softmax over retrieved and local logits; or "gate", the paper's learned scalar per head
        g = sigmoid(b) between the two (b starts at 0; with nothing retrieved the output is the local one).
    gate_output: a learned tanh gate on the output that starts at 0, for adding the layer to a trained model.
    short_conv: width of a causal depthwise convolution over queries and keys; 0 for none.
    qk_init: "induction" starts the layer as an induction head (see `nn.short_conv`); it needs short_conv >= 2.
    The other arguments are those of `Attention`.
    """

    out_bias = False

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        num_retrieved_memories: int = 32,
        xl_max_memories: int = 0,
        attn_scale_init: float = 20,
        gate_output: bool = False,
        num_kv_heads: int = 1,
        combine: str = "softmax",
        short_conv: int = 0,
        qk_init: str = "independent",
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            dim_head=dim_head,
            dropout=dropout,
            xl_max_memories=xl_max_memories,
            num_kv_heads=num_kv_heads,
        )
        if combine not in ("softmax", "gate"):
            raise ValueError(f"expected combine to be 'softmax' or 'gate', got {combine!r}")
        if qk_init not in ("independent", "induction"):
            raise ValueError(f"expected qk_init to be 'independent' or 'induction', got {qk_init!r}")
        if short_conv < 0:
            raise ValueError(f"expected short_conv to be at least 0, got {short_conv}")
        self.num_retrieved_memories = num_retrieved_memories
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(attn_scale_init)))
        self.gate = nn.Parameter(torch.zeros(heads, 1, 1)) if combine == "gate" else None
        self.output_gate = nn.Parameter(torch.zeros(1)) if gate_output else None
        self.short_conv = ShortConv((heads + num_kv_heads) * dim_head, short_conv) if short_conv > 0 else None
        if qk_init == "induction":
            self._start_as_induction_head()

    @torch.no_grad()
    def _start_as_induction_head(self) -> None:
        """Every query head becomes its key projection plus some of its own start; the convolution shifts the keys."""
        if self.short_conv is None or self.short_conv.width < 2:
            raise ValueError("expected short_conv to be at least 2 for qk_init='induction', got less")
        per_head = rearrange(self.to_q.weight, "(g r d) e -> g r d e", g=self.num_kv_heads, d=self.dim_head)
        keys = rearrange(self.to_kv.weight, "(kv g d) e -> kv g d e", kv=2, g=self.num_kv_heads)[0]
        per_head.mul_(INDUCTION_NOISE).add_(keys.unsqueeze(1))
        query_taps, key_taps = induction_taps(self.short_conv.width)
        self.short_conv.weight[: self.heads * self.dim_head] = query_taps
        self.short_conv.weight[self.heads * self.dim_head :] = key_taps

    def attend(
        self,
        x: Tensor,
        *,
        bias: Tensor,
        past: Tensor | None = None,
        look_up: LookUp | None = None,
        conv_state: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Attended:
        """As `Attention.attend`, with a search of the memory, and for the convolution its state (B, W - 1, C) and
        documents (B, T), over whose borders it does not reach; bias and look_up must hide the others themselves."""
        queries, pairs, conv_inputs = self._project(x, conv_state, documents)
        keys, values = join_past(past, pairs).unbind(dim=-2)
        lookup = None if look_up is None else look_up(queries, self.num_retrieved_memories)
        temperature = self.scale.exp()
        local_logits = at_least_float32(grouped_products(queries, keys)) * temperature + bias
        if lookup is None:
            local_weights, memory_weights = self._weigh(local_logits, None)
        else:
            memory_logits = retrieved_logits(queries, lookup) * temperature
            memory_logits = memory_logits.masked_fill(~lookup.mask, torch.finfo(memory_logits.dtype).min)
            local_weights, memory_weights = self._weigh(local_logits, memory_logits, lookup.mask)
        out = grouped_sums(local_weights, values)
        reading = None
        if lookup is not None and memory_weights is not None:
            out = out + retrieved_values(memory_weights, lookup)
            reading = Reading(queries.detach(), lookup, memory_weights.detach())
        out = self.to_out(rearrange(out, "b h t d -> b t (h d)").to(x.dtype))
        if self.output_gate is not None:
            out = out * self.output_gate.tanh()
        return Attended(out, pairs, conv_inputs, reading)

    def _project(self, x: Tensor, *context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Normalised queries (B, H, T, D), pairs (B, G, T, 2, D), and what went into the convolution, if any."""
        queries, (keys, values) = self.to_q(x), self.to_kv(x).chunk(2, dim=-1)
        conv_inputs = None
        if self.short_conv is not None:
            conv_inputs = torch.cat((queries, keys), dim=-1)
            convolved = self.short_conv(conv_inputs, *context)
            queries, keys = convolved.split((queries.shape[-1], keys.shape[-1]), dim=-1)
        queries = unit(rearrange(queries, "b t (h d) -> b h t d", h=self.heads))
        keys = unit(rearrange(keys, "b t (g d) -> b g t d", g=self.num_kv_heads))
        values = rearrange(values, "b t (g d) -> b g t d", g=self.num_kv_heads)
        return queries, torch.stack((keys, values.to(keys)), dim=-2), conv_inputs

    def _weigh(
        self, local_logits: Tensor, memory_logits: Tensor | None, found: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention weights over local keys (B, H, T, S) and retrieved ones (B, H, T, K)."""
        if self.gate is not None:
            # Where nothing was retrieved the gate is shut, but stays in the graph (as DistributedDataParallel needs).
            share = self.gate.sigmoid() * (0.0 if found is None else found.any(dim=-1, keepdim=True))
            local_weights = self.dropout(local_logits.softmax(dim=-1)) * (1 - share)
            if memory_logits is None:
                return local_weights, None
            return local_weights, self.dropout(memory_logits.softmax(dim=-1)) * share
        if memory_logits is None:
            return self.dropout(local_logits.softmax(dim=-1)), None
        weights = self.dropout(torch.cat((memory_logits, local_logits), dim=-1).softmax(dim=-1))
        memory_weights, local_weights = weights.split((memory_logits.shape[-1], local_logits.shape[-1]), dim=-1)
        return local_weights, memory_weights

    def forward(
        self,
        x: Tensor,
        *,
        knn_memory: Memory | None = None,
        xl_memory: Tensor | None = None,
        add_knn_memory: bool = True,
        rel_pos_bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer on its own: search the memory, attend, then store the pairs (with XL memory, those it discards).

        The arguments are those of `Attention.forward`; padding is not stored. A convolution starts at zero here; the
        model carries its state.
        """
        bias = self._local_bias(x, xl_memory, rel_pos_bias, mask)
        if mask is not None and self.short_conv is not None and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ValueError("expected padding on the right only, with short_conv (the model packs rows), got others")
        look_up = None if knn_memory is None else knn_memory.look_up
        attended = self.attend(x, bias=bias, past=xl_memory, look_up=look_up)
        new_xl_memory, discarded = self._roll(xl_memory, attended.pairs)
        if knn_memory is not None and add_knn_memory and discarded.shape[2] > 0:
            knn_memory.add(discarded, mask)
        return attended.out, new_xl_memory
