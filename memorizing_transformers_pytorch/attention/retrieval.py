"""Attention over retrieved entries, without copying their keys and values out of the memory.

Two operations on a table of vectors and K slots in it per query are each other's gradients:

    sampled_inner_products   vector . table[slot_k]            for each k
    weighted_sums            sum over k of weight_k * table[slot_k]

Logits are inner products of queries and keys (the search has already computed them), so the gradient of the queries
is a weighted sum of keys. The output is a weighted sum of values, so the gradient of the weights are inner products
with values. The memory itself gets no gradient. Nothing of size T * K * D is ever made: where the entries must be
converted (codes, or for float64), each of them is once, however often it was retrieved.

Shapes: B rows, H query heads, T queries, K retrieved, D head width, N slots in the whole memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memorizing_transformers_pytorch import kernels
from memorizing_transformers_pytorch.memory.retrieved import Table
from memorizing_transformers_pytorch.memory.vectors import Vectors


class Lookup(Protocol):
    """What a search found: slots, scores and mask (B, H, T, K), and the tables in which the entries lie.

    Usually that is one table, the memory itself. Entries that have been overwritten since lie in another.
    """

    slots: Tensor
    scores: Tensor
    mask: Tensor

    def tables(self) -> list[Table]: ...


LookUp = Callable[[Tensor, int], Lookup]
"""A search with queries (B, H, T, D) for so many entries each."""


class Memory(Protocol):
    """What a `KNNAttention` used on its own needs of a memory; `KNNMemory` has it."""

    def look_up(self, queries: Tensor, topk: int) -> Lookup: ...

    def add(self, memories: Tensor, mask: Tensor | None = None) -> None: ...


def retrieved_logits(queries: Tensor, lookup: Lookup) -> Tensor:
    """queries (B, H, T, D), those of the lookup -> their inner products with the retrieved keys (B, H, T, K).

    In float32 (float64 for float64 queries). Where the mask is False the logit is 0 and must be masked by the caller.
    """
    return _apply(_RetrievedLogits, queries, lookup)


def retrieved_values(weights: Tensor, lookup: Lookup) -> Tensor:
    """weights (B, H, T, K) -> sums of the retrieved values under these weights (B, H, T, D).

    Where the mask is False the weight must be 0.
    """
    return _apply(_RetrievedValues, weights, lookup)


def _apply(function: type[torch.autograd.Function], numbers: Tensor, lookup: Lookup) -> Tensor:
    # A compiler would trace backward together with forward, and miss what the lookup keeps in between.
    apply: Any = function.apply
    if torch.compiler.is_compiling():
        apply = torch.compiler.disable(apply)  # type: ignore[no-untyped-call]
    return cast(Tensor, apply(numbers, lookup))


class _RetrievedLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, lookup: Lookup) -> Tensor:
        ctx.lookup, ctx.dtype = lookup, queries.dtype
        return lookup.scores.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        tables = ctx.lookup.tables()
        sums = [weighted_sums(_within(grad, table), *_floats(table.keys, table.slots)) for table in tables]
        return sum(sums[1:], start=sums[0]).to(ctx.dtype), None


class _RetrievedValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, lookup: Lookup) -> Tensor:
        ctx.lookup = lookup
        tables = lookup.tables()
        sums = [weighted_sums(_within(weights, table), *_floats(table.values, table.slots)) for table in tables]
        return sum(sums[1:], start=sums[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        products = [
            _within(sampled_inner_products(grad, *_floats(table.values, table.slots)), table)
            for table in ctx.lookup.tables()
        ]
        return sum(products[1:], start=products[0]), None


def _within(numbers: Tensor, table: Table) -> Tensor:
    """The numbers (B, H, T, K) of entries in this table, 0 for those in another."""
    return numbers if table.mask is None else numbers.where(table.mask.to(numbers.device), 0)


def _floats(vectors: Vectors, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors (N, D) as numbers and the slots in them; of codes, which nothing computes with, the entries that
    occur (each once) and the slots within them."""
    if vectors.scales is None:
        return vectors.numbers, slots
    used, slots = slots.to(vectors.device).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return vectors.at(used).floats(), slots


def weighted_sums(weights: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """weights (..., K), table (N, D), slots (..., K) -> (..., D) in the dtype and on the device of the weights."""
    table, slots = _at_precision(table, slots.to(table.device), weights.dtype)
    bags = slots.reshape(-1, slots.shape[-1])
    if kernels.available(table):
        from memorizing_transformers_pytorch.kernels.bags import bag_sums

        return (
            bag_sums(weights.to(table.device).reshape(bags.shape), table, bags).view(*slots.shape[:-1], -1).to(weights)
        )
    scaled, total = _fit_dtype(weights, table)
    sums = F.embedding_bag(bags, table, per_sample_weights=scaled.reshape(bags.shape), mode="sum")
    return sums.view(*slots.shape[:-1], -1).to(weights) * total


def sampled_inner_products(vectors: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """vectors (..., D), table (N, D), slots (..., K) -> (..., K) in the dtype and on the device of the vectors."""
    table, slots = _at_precision(table, slots.to(table.device), vectors.dtype)
    if kernels.available(table):
        from memorizing_transformers_pytorch.kernels.bags import bag_products

        flat = vectors.to(table.device).reshape(-1, vectors.shape[-1])
        return bag_products(flat, table, slots.reshape(-1, slots.shape[-1])).view(slots.shape).to(vectors)
    if table.is_cuda and table.dtype == torch.bfloat16:  # PyTorch has no such function for them there
        table, slots = _occurring(table, slots, torch.float32)
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
        return table, slots
    return _occurring(table, slots, torch.float64)


def _occurring(table: Tensor, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The entries that occur (each once) in this dtype, and the slots within them."""
    used, slots = slots.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return table[used].to(dtype), slots


def _fit_dtype(numbers: Tensor, table: Tensor) -> tuple[Tensor, Tensor | float]:
    """The numbers (..., n) in the dtype of the table; where that has a narrower range, scaled so that their absolute
    values add up to 1: no sum is then larger than the largest number in the table."""
    if numbers.dtype == table.dtype or table.dtype in (torch.float32, torch.float64):
        return numbers.to(table), 1.0
    total = numbers.abs().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(numbers.dtype).tiny)
    return (numbers / total).to(table), total
