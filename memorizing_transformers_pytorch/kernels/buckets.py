"""The largest inner product within each bucket of keys, without ever writing all of them down (Chern et al. 2022).

Key number n is in bucket n % L. Each program multiplies a block of queries with one block of buckets after the other's
keys and keeps the maxima.

Shapes: Q queries, N keys, D width, L buckets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_QUERIES, _BUCKETS = 64, 64


@triton.jit
def _maxima_kernel(
    queries, keys, maxima, num_queries, num_keys, num_buckets, width,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, BUCKETS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    buckets = tl.program_id(1) * BUCKETS + tl.arange(0, BUCKETS)
    columns = tl.arange(0, D)
    inside = columns < width
    query_mask = (rows < num_queries)[:, None] & inside[None, :]
    block = tl.load(queries + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=query_mask, other=0.0)
    best = tl.full((QUERIES, BUCKETS), float("-inf"), tl.float32)
    for start in range(0, num_keys, num_buckets):
        places = start + buckets
        there = (buckets < num_buckets) & (places < num_keys)
        addresses = keys + places.to(tl.int64)[:, None] * width + columns[None, :]
        some = tl.load(addresses, mask=there[:, None] & inside[None, :], other=0.0).to(block.dtype)
        scores = tl.dot(block, tl.trans(some), input_precision=PRECISION)
        best = tl.maximum(best, tl.where(there[None, :], scores, float("-inf")))
    mask = (rows < num_queries)[:, None] & (buckets < num_buckets)[None, :]
    tl.store(maxima + rows.to(tl.int64)[:, None] * num_buckets + buckets[None, :], best, mask=mask)


def bucket_maxima(queries: Tensor, keys: Tensor, num_buckets: int) -> Tensor:
    """queries (Q, D) float32, keys (N, D) of any precision -> (Q, L) float32; -inf for a bucket without keys.

    As exact as `torch.set_float32_matmul_precision` allows.
    """
    maxima = queries.new_empty(queries.shape[0], num_buckets)
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    grid = (triton.cdiv(queries.shape[0], _QUERIES), triton.cdiv(num_buckets, _BUCKETS))
    sizes = (queries.shape[0], keys.shape[0], num_buckets, queries.shape[1])
    if maxima.numel():
        blocks = {"QUERIES": _QUERIES, "BUCKETS": _BUCKETS, "D": max(triton.next_power_of_2(queries.shape[1]), 16)}
        _maxima_kernel[grid](queries.contiguous(), keys.contiguous(), maxima, *sizes, PRECISION=precision, **blocks)
    return maxima
