"""Sums over retrieved entries, and inner products with them, read where they lie: nothing is gathered.

Each program takes one bag, the K slots of one query: for sums a block of columns, entry after entry; for products a
block of entries, column after column. They are each other's gradients; see `attention.ops`.

Shapes: N slots in the table, D width, B bags, K slots in each.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES, COLUMNS = 32, 64  # of the block of a table that a program holds


@triton.jit
def sum_kernel(
    weights, slots, table, sums, size, width, num_blocks, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    bag = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, size, ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        there = entries < size
        weight = tl.load(weights + bag * size + entries, mask=there, other=0.0).to(tl.float32)
        slot = tl.load(slots + bag * size + entries, mask=there, other=0)
        mask = there[:, None] & inside[None, :]
        rows = tl.load(table + slot[:, None] * width + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(weight[:, None] * rows.to(tl.float32), axis=0)
    tl.store(sums + bag * width + columns, total, mask=inside)


@triton.jit
def product_kernel(
    vectors, slots, table, products, size, width, num_blocks, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    bag = (tl.program_id(0) // num_blocks).to(tl.int64)
    entries = tl.program_id(0) % num_blocks * ENTRIES + tl.arange(0, ENTRIES)
    there = entries < size
    slot = tl.load(slots + bag * size + entries, mask=there, other=0)
    total = tl.zeros((ENTRIES,), tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < width
        vector = tl.load(vectors + bag * width + columns, mask=inside, other=0.0).to(tl.float32)
        mask = there[:, None] & inside[None, :]
        rows = tl.load(table + slot[:, None] * width + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(vector[None, :] * rows.to(tl.float32), axis=1)
    tl.store(products + bag * size + entries, total, mask=there)


def bag_sums(weights: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """weights (B, K), table (N, D), slots (B, K) -> float32 (B, D): the sum of weight times entry over each bag."""
    sums = weights.new_empty(slots.shape[0], table.shape[1], dtype=torch.float32)
    return _launch(sum_kernel, table.shape[1], COLUMNS, weights, slots, table, sums)


def bag_products(vectors: Tensor, table: Tensor, slots: Tensor) -> Tensor:
    """vectors (B, D), table (N, D), slots (B, K) -> float32 (B, K): the inner products of vector and entries."""
    products = vectors.new_empty(slots.shape, dtype=torch.float32)
    return _launch(product_kernel, slots.shape[1], ENTRIES, vectors, slots, table, products)


def _launch(kernel: Any, parted: int, block: int, numbers: Tensor, slots: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """Fill `out` by a program for each bag and block of the size that is `parted`."""
    bags, size = slots.shape
    if out.numel() == 0 or size == 0:
        return out.zero_()
    num_blocks = triton.cdiv(parted, block)
    sizes = (size, table.shape[1], num_blocks)
    with on_device(out):
        tensors = (numbers.contiguous(), slots.contiguous(), table.contiguous(), out)
        kernel[(bags * num_blocks,)](*tensors, *sizes, ENTRIES=ENTRIES, COLUMNS=COLUMNS)
    return out


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Inside, the device of the tensor is the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
