"""Sums over retrieved entries, and inner products with them, read where they lie: nothing is gathered.

Each program takes one bag: the K slots of one query. They are each other's gradients; see `nn.retrieval`.

Shapes: N slots in the table, D width, B bags, K slots in each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_kernel(weights, slots, table, sums, size, width, K: tl.constexpr, D: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    entries, columns = tl.arange(0, K), tl.arange(0, D)
    there, inside = entries < size, columns < width
    weight = tl.load(weights + bag * size + entries, mask=there, other=0.0).to(tl.float32)
    slot = tl.load(slots + bag * size + entries, mask=there, other=0)
    rows = tl.load(table + slot[:, None] * width + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    tl.store(sums + bag * width + columns, tl.sum(weight[:, None] * rows.to(tl.float32), axis=0), mask=inside)


@triton.jit
def _product_kernel(vectors, slots, table, products, size, width, K: tl.constexpr, D: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    entries, columns = tl.arange(0, K), tl.arange(0, D)
    there, inside = entries < size, columns < width
    vector = tl.load(vectors + bag * width + columns, mask=inside, other=0.0).to(tl.float32)
    slot = tl.load(slots + bag * size + entries, mask=there, other=0)
    rows = tl.load(table + slot[:, None] * width + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    tl.store(products + bag * size + entries, tl.sum(vector[None, :] * rows.to(tl.float32), axis=1), mask=there)


def bag_sums(weights: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """weights (B, K), table (N, D), slots (B, K) -> float32 (B, D): the sum of weight times entry over each bag."""
    sums = weights.new_empty(slots.shape[0], table.shape[1], dtype=torch.float32)
    return _launch(_sum_kernel, weights, slots, table, sums)


def bag_products(vectors: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """vectors (B, D), table (N, D), slots (B, K) -> float32 (B, K): the inner products of vector and entries."""
    products = vectors.new_empty(slots.shape, dtype=torch.float32)
    return _launch(_product_kernel, vectors, slots, table, products)


def _launch(kernel: object, numbers: Tensor, slots: Tensor, table: Tensor, result: Tensor) -> Tensor:
    bags, size = slots.shape
    if result.numel() and size:
        width = table.shape[1]
        blocks = {"K": triton.next_power_of_2(size), "D": triton.next_power_of_2(width)}
        arguments = (numbers.contiguous(), slots.contiguous(), table.contiguous(), result, size, width)
        kernel[(bags,)](*arguments, **blocks)  # type: ignore[index]
        return result
    return result.zero_()
