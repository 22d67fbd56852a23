"""The slow, obvious versions of what the package computes: tests compare the two.

Shapes: B rows, H query heads, G key/value heads, T queries, S local keys, K retrieved, D head width, W width of the
convolution, C its channels. Query head h reads key/value head h // (H / G).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from memorizing_transformers_pytorch.attention.attention import Attention
from memorizing_transformers_pytorch.attention.causal import RelativePositionBias
from memorizing_transformers_pytorch.attention.knn_attention import KNNAttention


class Entry(NamedTuple):
    """One remembered pair of every key/value head, (G, D) each, and its origin (document id, position, token id)."""

    key: Tensor
    value: Tensor
    origin: tuple[int, ...]


class Found(NamedTuple):
    """Copies of the retrieved keys and values (B, H, T, K, D), best first, and which of them exist (B, H, T, K)."""

    keys: Tensor
    values: Tensor
    mask: Tensor


def best_entries(query: Tensor, keys: Sequence[Tensor], topk: int) -> list[int]:
    """Which of the keys (D,) have the largest inner product with the query (D,), best first."""
    return sorted(range(len(keys)), key=lambda n: -float(keys[n].to(query.dtype) @ query))[:topk]


def kept(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """What a memory of this dtype keeps of vectors (..., D), as numbers: for int8 127 steps up, and as many down."""
    if dtype != torch.int8:
        return vectors.to(dtype, copy=True)
    flat = [torch.tensor(_in_steps(vector)) for vector in vectors.float().reshape(-1, vectors.shape[-1]).tolist()]
    return torch.stack(flat).view(vectors.shape) if flat else vectors.float()


def _in_steps(numbers: list[float]) -> list[float]:
    scale = _float32(max(map(abs, numbers)) / 127)
    return [_float32(round(_float32(x / scale)) * scale) if scale else 0.0 for x in numbers]


def _float32(x: float) -> float:
    return float(np.float32(x))


class ListMemory:
    """For each row a plain list of its last `capacity` entries, rounded to `dtype`."""

    def __init__(self, *, rows: int, capacity: int, dtype: torch.dtype = torch.float32) -> None:
        self.capacity = capacity
        self.dtype = dtype
        self.entries: list[list[Entry]] = [[] for _ in range(rows)]

    def add(
        self,
        memories: Tensor,
        mask: Tensor | None = None,
        origins: Tensor | None = None,
        rows: Iterable[int] | None = None,
    ) -> None:
        """Append memories (B, G, N, 2, D), except where the mask (B, N) is False, and forget the oldest."""
        rounded = kept(memories.detach(), self.dtype)
        for i, row in enumerate(range(len(self.entries)) if rows is None else rows):
            for n in range(memories.shape[2]):
                if mask is None or bool(mask[i, n]):
                    origin = (-1, -1, -1) if origins is None else tuple(origins[i, n].tolist())
                    self.entries[row].append(Entry(rounded[i, :, n, 0], rounded[i, :, n, 1], origin))
            self.entries[row] = self.entries[row][-self.capacity :]

    def clear(self, rows: Iterable[int] | None = None) -> None:
        """Empty these rows, or all of them."""
        for row in range(len(self.entries)) if rows is None else rows:
            self.entries[row] = []

    def search(self, queries: Tensor, topk: int, kv_heads: int, rows: Sequence[int] | None = None) -> Found:
        """Copies, in the dtype of the queries (B, H, T, D), of the best entries for each; 0 where there is none."""
        batch, heads, length, dim = queries.shape
        keys, values = queries.new_zeros(2, batch, heads, length, topk, dim).unbind()
        mask = torch.zeros(batch, heads, length, topk, dtype=torch.bool)
        for i, row in enumerate(range(batch) if rows is None else rows):
            for head in range(heads):
                kv_head = head * kv_heads // heads
                row_keys = [entry.key[kv_head] for entry in self.entries[row]]
                for t in range(length):
                    for k, n in enumerate(best_entries(queries[i, head, t].detach(), row_keys, topk)):
                        keys[i, head, t, k] = row_keys[n]
                        values[i, head, t, k] = self.entries[row][n].value[kv_head]
                        mask[i, head, t, k] = True
        return Found(keys, values, mask)


def gathered_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products of queries (B, H, T, D) with keys gathered for each of them (B, H, T, K, D)."""
    return torch.einsum("bhtd,bhtkd->bhtk", queries, keys)


def gathered_sums(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of values gathered for each query (B, H, T, K, D) under weights (B, H, T, K)."""
    return torch.einsum("bhtk,bhtkd->bhtd", weights, values)


def gathered_attention(
    queries: Tensor,
    found: Found,
    local_logits: Tensor,
    local_values: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    gate: Tensor | None = None,
) -> Tensor:
    """Attention over retrieved and local entries: one softmax, or with a gate (H, 1, 1) a share for each of the two.

    local_logits (B, H, T, S) with -inf for invisible keys, local_values (B, H, S, D) -> (B, H, T, D).
    """
    memory_logits = gathered_logits(queries, found.keys) * temperature
    if gate is not None:
        exponentials = memory_logits.exp() * found.mask
        total = exponentials.sum(dim=-1, keepdim=True)
        from_memory = gathered_sums(exponentials / total.where(total > 0, 1), found.values)
        share = gate.sigmoid() * found.mask.any(dim=-1, keepdim=True)
        return share * from_memory + (1 - share) * (local_logits.softmax(dim=-1) @ local_values)
    logits = torch.cat((memory_logits.masked_fill(~found.mask, -math.inf), local_logits), dim=-1)
    memory_weights, local_weights = logits.softmax(dim=-1).tensor_split([memory_logits.shape[-1]], dim=-1)
    return gathered_sums(memory_weights, found.values) + local_weights @ local_values


def causal_bias(num_queries: int, num_keys: int, bias: Tensor | None = None) -> Tensor:
    """The bias (1, H, T, S), or 0, and -inf where a key lies ahead of its query; the queries are the last positions."""
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    return (torch.zeros(1, 1, 1, 1) if bias is None else bias).masked_fill(~visible, -math.inf)


def join_pairs(past: Tensor | None, pairs: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, S, D) of the past, without gradient, and the segment, repeated for each query head."""
    joined = pairs if past is None else torch.cat((past.detach(), pairs), dim=2)
    keys, values = joined.repeat_interleave(heads // pairs.shape[1], dim=1).unbind(dim=-2)
    return keys, values


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H * D) -> (B, H, T, D)."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def attention(layer: Attention, x: Tensor, *, past: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A whole `Attention` in evaluation mode, from its parameters; bias as for its `forward`."""
    keys, values = (split_heads(part, layer.num_kv_heads) for part in layer.to_kv(x).chunk(2, dim=-1))
    keys, values = join_pairs(past, torch.stack((keys, values), dim=-2), layer.heads)
    logits = split_heads(layer.to_q(x), layer.heads) @ keys.mT / math.sqrt(layer.dim_head)
    weights = (logits + causal_bias(x.shape[1], keys.shape[2], bias)).softmax(dim=-1)
    out: Tensor = layer.to_out((weights @ values).transpose(1, 2).flatten(2))
    return out


def knn_attention(
    layer: KNNAttention,
    x: Tensor,
    memory: ListMemory | None = None,
    *,
    past: Tensor | None = None,
    bias: Tensor | None = None,
    conv_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A whole `KNNAttention` in evaluation mode, from its parameters: its output, and its pairs (B, G, T, 2, D)."""
    queries, (keys, values) = layer.to_q(x), layer.to_kv(x).chunk(2, dim=-1)
    if layer.short_conv is not None:
        convolved = causal_convolution(torch.cat((queries, keys), dim=-1), layer.short_conv.weight, conv_state)
        queries, keys = convolved.tensor_split([queries.shape[-1]], dim=-1)
    queries, keys = split_heads(queries, layer.heads), split_heads(keys, layer.num_kv_heads)
    queries, keys = queries / queries.norm(dim=-1, keepdim=True), keys / keys.norm(dim=-1, keepdim=True)
    pairs = torch.stack((keys, split_heads(values, layer.num_kv_heads)), dim=-2)
    keys, values = join_pairs(past, pairs, layer.heads)
    temperature = layer.scale.exp()
    logits = queries @ keys.mT * temperature + causal_bias(x.shape[1], keys.shape[2], bias)
    if memory is None:
        attended = logits.softmax(dim=-1) @ values
    else:
        found = memory.search(queries, layer.num_retrieved_memories, layer.num_kv_heads)
        attended = gathered_attention(queries, found, logits, values, temperature=temperature, gate=layer.gate)
    out: Tensor = layer.to_out(attended.transpose(1, 2).flatten(2))
    return (out if layer.output_gate is None else out * layer.output_gate.tanh()), pairs


def t5_bucket(distance: int, num_buckets: int = 32, max_distance: int = 128) -> int:
    """The bucket of a distance of at least 0 (T5): one each for the small ones, then logarithmic."""
    exact = num_buckets // 2
    if distance < exact:
        return distance
    growth = math.log(distance / exact) / math.log(max_distance / exact)
    return min(exact + int(growth * (num_buckets - exact)), num_buckets - 1)


def position_bias(layer: RelativePositionBias, num_queries: int, num_keys: int) -> Tensor:
    """The bias (H, T, S) of a `RelativePositionBias`, pair by pair; query i stands at S - T + i."""
    weight = layer.relative_attention_bias.weight
    bias = torch.full((weight.shape[1], num_queries, num_keys), -math.inf, dtype=weight.dtype)
    for i in range(num_queries):
        for j in range(num_keys - num_queries + i + 1):
            distance = num_keys - num_queries + i - j
            bias[:, i, j] = weight[t5_bucket(distance, layer.num_buckets, layer.max_distance)] * layer.scale
    return bias


def causal_convolution(x: Tensor, weight: Tensor, state: Tensor | None = None) -> Tensor:
    """x (B, T, C), weight (C, W) with the newest last, state (B, W - 1, C) before x, 0 if None -> (B, T, C)."""
    width = weight.shape[1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if state is None else state
    inputs = torch.cat((before, x), dim=1)
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for w in range(width):
            out[:, t] += weight[:, w] * inputs[:, t + w]
    return out
