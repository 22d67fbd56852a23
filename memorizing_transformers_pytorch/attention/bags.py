"""Sums over entries that a search has found, and inner products with them, read where they lie.

Two operations on a table of vectors and K slots in it per query are each other's gradients:

    sampled_inner_products   vector . table[slot_k]            for each k
    weighted_sums            sum over k of weight_k * table[slot_k]

Nothing of size T * K * D is ever made: where the entries must be converted (codes, or for float64), each of them is
once, however often it was retrieved.

Shapes: B rows, H query heads, T queries, K retrieved, D head width, N slots in a table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch.kernels.availability import available
from memorizing_transformers_pytorch.memory.lease import Table


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
    """The vectors (N, D) as numbers and the slots in them; of codes, which nothing computes with, the entries that
    occur (each once) and the slots within them."""
    vectors, slots = table.keys if of_keys else table.values, table.slots
    if vectors.scales is None:
        return vectors.numbers, slots
    used, slots = slots.to(vectors.device).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return vectors.at(used).floats(), slots


def weighted_sums(weights: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """weights (..., K), table (N, D), slots (..., K) -> (..., D) in the dtype and on the device of the weights."""
    table, slots = _at_precision(table, slots.to(table.device), weights.dtype)
    bags = slots.reshape(-1, slots.shape[-1])
    if available(table):
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
    if available(table):
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
