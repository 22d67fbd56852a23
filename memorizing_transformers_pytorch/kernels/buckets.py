"""The largest inner product within each bucket of keys, without ever writing all of them down (Chern et al. 2022).

Key number n is in bucket n % L. Each program multiplies a block of queries with one block of buckets after the other's
keys, some columns at a time, and keeps the maxima.

Shapes: Q queries, N keys, D width, L buckets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memorizing_transformers_pytorch.kernels.bags import on_device

QUERIES, BUCKETS, COLUMNS = 64, 64, 64  # of the blocks that a program multiplies


@triton.jit
def maxima_kernel(
    queries, keys, maxima, num_queries, num_keys, num_buckets, width,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, BUCKETS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(num_buckets, BUCKETS)
    rows = tl.program_id(0) // num_blocks * QUERIES + tl.arange(0, QUERIES)
    buckets = tl.program_id(0) % num_blocks * BUCKETS + tl.arange(0, BUCKETS)
    asked = (rows < num_queries)[:, None]
    query_rows = queries + rows.to(tl.int64)[:, None] * width
    best = tl.full((QUERIES, BUCKETS), float("-inf"), tl.float32)
    for start in range(0, num_keys, num_buckets):
        places = start + buckets
        there = (buckets < num_buckets) & (places < num_keys)
        key_rows = keys + places.to(tl.int64)[:, None] * width
        scores = tl.zeros((QUERIES, BUCKETS), tl.float32)
        for first in range(0, width, COLUMNS):
            columns = (first + tl.arange(0, COLUMNS))[None, :]
            block = tl.load(query_rows + columns, mask=asked & (columns < width), other=0.0)
            some = tl.load(key_rows + columns, mask=there[:, None] & (columns < width), other=0.0).to(tl.float32)
            scores = tl.dot(block, tl.trans(some), scores, input_precision=PRECISION)
        best = tl.maximum(best, tl.where(there[None, :], scores, float("-inf")))
    mask = asked & (buckets < num_buckets)[None, :]
    tl.store(maxima + rows.to(tl.int64)[:, None] * num_buckets + buckets[None, :], best, mask=mask)


def bucket_maxima(queries: Tensor, keys: Tensor, num_buckets: int) -> Tensor:
    """queries (Q, D) float32, keys (N, D) of any precision -> (Q, L) float32; -inf for a bucket without keys.

    As exact as `torch.set_float32_matmul_precision` allows.
    """
    maxima = queries.new_empty(queries.shape[0], num_buckets)
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    programs = triton.cdiv(queries.shape[0], QUERIES) * triton.cdiv(num_buckets, BUCKETS)
    sizes = (queries.shape[0], keys.shape[0], num_buckets, queries.shape[1])
    blocks = {"QUERIES": QUERIES, "BUCKETS": BUCKETS, "COLUMNS": COLUMNS}
    if maxima.numel():
        with on_device(maxima):
            tensors = (queries.contiguous(), keys.contiguous(), maxima)
            maxima_kernel[(programs,)](*tensors, *sizes, PRECISION=precision, **blocks)
    return maxima
