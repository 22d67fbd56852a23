"""Attention over a segment, its past, and entries retrieved from a memory.

Shapes: B rows, H query heads, G key/value heads, T queries, P past keys, S = P + T keys, K retrieved, D head width,
E model width. Pairs are (B, G, n, 2, D): keys at [..., 0, :], values at [..., 1, :].
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from memorizing_transformers_pytorch.attention.attention import Attended, AttentionBase, Reading, Search, join_past
from memorizing_transformers_pytorch.attention.causal import at_least_float32, causal_attention, causal_part
from memorizing_transformers_pytorch.attention.ops import gated, memory_attention, merged, shares
from memorizing_transformers_pytorch.attention.short_conv import ShortConv, induction_taps
from memorizing_transformers_pytorch.memory.knn_memory import KNNMemory

# The query heads of an induction start differ from the key projection by this share of their own random start.
INDUCTION_NOISE = 0.3

Local = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries (B, H, T, D) times the temperature, keys and values (B, G, S, D), bias (B or 1, H, T, S)."""


class KNNAttention(AttentionBase):
    """Attention over the segment, its past, and the K best entries of a memory (Wu et al., ICLR 2022, section 3.1).

    Queries and keys are l2-normalised, with a learned temperature per head (Henry et al. 2020) that starts at
    `attn_scale_init`. The same query serves local keys and the memory; retrieved keys get no position bias.

    combine: "softmax", one softmax over retrieved and local logits; or "gate", the paper's learned scalar per head
        g = sigmoid(b) between the two (b starts at 0; with nothing retrieved the output is the local one).
    gate_output: a learned tanh gate on the output that starts at 0, for adding the layer to a trained model.
    short_conv: width of a causal depthwise convolution over queries and keys; 0 for none.
    qk_init: "induction" starts the layer as an induction head (see `attention.short_conv`); it needs short_conv >= 2.
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
        look_up: Search | None = None,
        conv_state: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Attended:
        """As `Attention.attend`, with a search of the memory, and for the convolution its state (B, W - 1, C) and
        documents (B, T), over whose borders it does not reach; bias and look_up must hide the others themselves."""
        queries, pairs, conv_inputs = self._project(x, conv_state, documents)
        keys, values = join_past(past, pairs).unbind(dim=-2)
        temperature = self.scale.exp()
        local = ((queries * temperature).to(queries.dtype), keys, values, bias)
        dropout = self.dropout.p if self.training else 0.0
        if look_up is None:
            unused = 0 if self.gate is None else 0 * self.gate  # in the graph, as DistributedDataParallel needs
            return Attended(self._out(causal_attention(*local, dropout) + unused, x), pairs, conv_inputs)
        found = look_up(queries, self.num_retrieved_memories)
        part = memory_attention(queries, found, temperature, dropout=dropout)
        if self.gate is None:
            parts = [part, causal_part(*local, dropout)]
            out, of_memory = merged(parts)[0], shares(parts)[0]
        else:
            out = gated(causal_attention(*local, dropout), part, self.gate)
            of_memory = self.gate.sigmoid() * found.mask.any(dim=-1, keepdim=True)
        reading = Reading(queries.detach(), found, temperature.detach(), part[1].detach(), of_memory.detach())
        return Attended(self._out(out, x), pairs, conv_inputs, reading)

    def _out(self, sums: Tensor, x: Tensor) -> Tensor:
        """Sums of values (B, H, T, D) -> (B, T, E) in the dtype of x."""
        out: Tensor = self.to_out(rearrange(sums, "b h t d -> b t (h d)").to(x.dtype))
        return out if self.output_gate is None else out * self.output_gate.tanh()

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

    def forward(
        self,
        x: Tensor,
        *,
        knn_memory: KNNMemory | None = None,
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


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis, in float32 or better; (nearly) zero vectors stay as they are.

    The first key of a document, with a convolution that looks at earlier tokens only, is zero: dividing it by a tiny
    epsilon, as `F.normalize` does, would give it a gradient of 1e12.
    """
    wide = at_least_float32(x)
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / norm.masked_fill(norm < 1e-6, 1)).to(x.dtype)
