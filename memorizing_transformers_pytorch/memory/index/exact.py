"""Finding the stored keys that have the largest inner product with a query.

An index sees the keys of one row where they lie in the store and answers with places in the ring. The exact index keeps
nothing of its own: brute force over the buffer needs neither insertion nor deletion.

Shapes: G key/value heads, Q queries, N entries in the row, K retrieved, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import faiss
import torch
from torch import Tensor

from memorizing_transformers_pytorch.kernels import available
from memorizing_transformers_pytorch.memory.entries import Vectors

# A block of converted keys should stay in cache; a block of scores should not fill the memory of a GPU.
MAX_BLOCK_ENTRIES = 65_536
MAX_BLOCK_SCORES = 2**26
MAX_GATHERED = 2**20  # numbers, that fit into the cache
_SAME_SCORE = 1e-5  # by which two float32 inner products, relative to the best, may differ and be the same


class Best(NamedTuple):
    """scores (..., K), best first, and the places (..., K) int64 where those entries lie."""

    scores: Tensor
    places: Tensor


class Ring(NamedTuple):
    """The entries of one row as an index sees them.

    keys: (G, N, D), those in places 0 to N - 1. row: its number. cursor: the place that is written next.
    written: how many entries were written since the row was last empty, overwritten ones included.
    epoch: changes whenever the row is emptied or its entries move; no two rows of any stores share one.
    """

    keys: Vectors
    row: int
    cursor: int
    written: int
    epoch: int


class Index(Protocol):
    """Searches the keys of one row. Implementations may approximate which entries they find, never their scores."""

    def search(self, ring: Ring, queries: Tensor, topk: int) -> Best:
        """queries (G, Q, D) -> the min(topk, N) best entries for each query, as (G, Q, K)."""
        ...

    def forget(self, rows: Iterable[int] | None = None) -> None:
        """Let go of whatever is kept of these rows, or of all: their entries are gone."""
        ...

    @property
    def description(self) -> str:
        """What searches, in words."""
        ...


class ExactIndex:
    """Brute force: exactly the entries with the largest inner products, accumulated in float32 or better.

    (On a GPU as exact as `torch.set_float32_matmul_precision` allows.) Keys that are not in
    float32 are converted a block at a time.
    """

    description = "exact"

    def search(self, ring: Ring, queries: Tensor, topk: int) -> Best:
        return best_of(queries, ring.keys, topk)

    def forget(self, rows: Iterable[int] | None = None) -> None:
        """Nothing is kept."""


def best_of(queries: Tensor, keys: Vectors, topk: int) -> Best:
    """The min(topk, N) best of the keys (G, N, D) for each of the queries (G, Q, D), as (G, Q, K)."""
    accumulate = torch.float64 if queries.dtype == torch.float64 else torch.float32
    if accumulate == torch.float32 and keys.shape[1] and available(keys.numbers):
        return _best_by_kernels(queries.float(), keys.numbers, min(topk, keys.shape[1]))
    on_faiss = keys.device.type == "cpu" and accumulate == torch.float32
    best_in_block = _best_by_faiss if on_faiss else _best_by_matmul
    if on_faiss and keys.numbers.dtype == torch.float32:
        block_entries = max(keys.shape[1], 1)
    else:
        scores_per_entry = max(queries.shape[0] * queries.shape[1], 1)
        block_entries = max(min(MAX_BLOCK_ENTRIES, MAX_BLOCK_SCORES // scores_per_entry), topk)
    return _running_best(queries.to(accumulate), keys, topk, block_entries, best_in_block)


def _running_best(
    queries: Tensor, keys: Vectors, topk: int, block_entries: int, best_in_block: Callable[[Tensor, Tensor, int], Best]
) -> Best:
    """The best of all entries, from the best of each block of them."""
    best: Best | None = None
    for start in range(0, keys.shape[1], block_entries):
        block = keys[:, start : start + block_entries].floats(queries.dtype)
        scores, places = best_in_block(queries, block, min(topk, block.shape[1]))
        found = Best(scores, places + start)
        best = found if best is None else _better_of(best, found, topk)
    if best is None:
        raise ValueError("expected at least one entry to search, got 0")
    return best


def _better_of(left: Best, right: Best, topk: int) -> Best:
    scores = torch.cat((left.scores, right.scores), dim=-1)
    places = torch.cat((left.places, right.places), dim=-1)
    scores, order = scores.topk(min(topk, scores.shape[-1]), dim=-1)
    return Best(scores, places.gather(-1, order))


def _best_by_matmul(queries: Tensor, keys: Tensor, topk: int) -> Best:
    """Of all products, by buckets: those with the topk largest maxima hold the topk largest products."""
    count = keys.shape[1]
    with torch.autocast(keys.device.type, enabled=False):
        scores = queries @ keys.mT
    buckets = _num_buckets(count, topk)
    if 2 * buckets > count:
        return Best(*scores.topk(topk, dim=-1))
    places = _members(_bucket_maxima(scores, buckets).topk(topk, dim=-1).indices, buckets, count)
    return best_members(scores.gather(-1, places.clamp_min(0)), places, topk)


def _best_by_kernels(queries: Tensor, keys: Tensor, topk: int) -> Best:
    """The same without writing all products down: those in the best buckets are computed once more."""
    from memorizing_transformers_pytorch.kernels.bags import bag_products
    from memorizing_transformers_pytorch.kernels.buckets import bucket_maxima

    count = keys.shape[1]
    buckets = min(_num_buckets(count, topk), count)
    found = []
    for head_queries, head_keys in zip(queries, keys, strict=True):
        chosen = bucket_maxima(head_queries, head_keys, buckets).topk(topk, dim=-1).indices
        places = _members(chosen, buckets, count)
        found.append(best_members(bag_products(head_queries, head_keys, places.clamp_min(0)), places, topk))
    return Best(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _num_buckets(count: int, topk: int) -> int:
    """A power of two near sqrt(N * K), so that there are about as many buckets as entries in the best of them."""
    return max(int(2 ** round(math.log2(math.sqrt(count * topk)))), topk)


def _bucket_maxima(scores: Tensor, buckets: int) -> Tensor:
    """scores (..., N) -> (..., L): the largest of each bucket, n % L being that of score number n."""
    rest = scores.shape[-1] % buckets
    whole = scores[..., : scores.shape[-1] - rest]
    maxima = whole.view(*scores.shape[:-1], -1, buckets).amax(dim=-2)
    if rest:
        maxima[..., :rest] = torch.maximum(maxima[..., :rest], scores[..., scores.shape[-1] - rest :])
    return maxima


def _members(chosen: Tensor, buckets: int, count: int) -> Tensor:
    """Buckets (..., K) -> the places (..., K * n) of what is in them, -1 where one has fewer."""
    steps = torch.arange(0, count, buckets, device=chosen.device)
    places = (chosen.unsqueeze(-1) + steps).flatten(-2)
    return places.masked_fill(places >= count, -1)


def best_members(scores: Tensor, places: Tensor, topk: int) -> Best:
    """The best where there is a place: before any gap even an entry whose product overflows to minus infinity."""
    ranks = scores.clamp_min(torch.finfo(scores.dtype).min).masked_fill(places < 0, -torch.inf)
    order = ranks.topk(topk, dim=-1).indices
    return Best(scores.gather(-1, order), places.gather(-1, order))


def _best_by_faiss(queries: Tensor, keys: Tensor, topk: int) -> Best:
    found = [
        faiss.knn(head_queries, head_keys, topk, metric=faiss.METRIC_INNER_PRODUCT)
        for head_queries, head_keys in zip(queries.contiguous().numpy(), keys.numpy(), strict=True)
    ]
    scores, places = (torch.stack([torch.from_numpy(part) for part in parts]) for parts in zip(*found, strict=True))
    if bool((places < 0).any()):  # faiss skips inner products that overflow to minus infinity
        return _best_by_matmul(queries, keys, topk)
    return Best(scores, places)


def inner_products(queries: Tensor, keys: Vectors, places: Tensor) -> Tensor:
    """queries (Q, D), keys (N, D), places (Q, K) -> (Q, K), in the dtype of the queries, a few queries at a time."""
    at_once = max(MAX_GATHERED // max(places.shape[1] * keys.shape[1], 1), 1)
    parts = [
        (keys[some_places].floats(some.dtype) @ some.unsqueeze(-1)).squeeze(-1)
        for some, some_places in zip(torch.split(queries, at_once), torch.split(places, at_once), strict=True)
    ]
    return torch.cat(parts)


def num_found(scores: Tensor, best: Tensor) -> int:
    """How many of the found scores (..., K) are among the best (..., K).

    An entry as good as the last of the best counts as such: the same keys may be there several times.
    """
    tolerance = _SAME_SCORE * best.abs().amax(dim=-1, keepdim=True)
    return int((scores >= best[..., -1:] - tolerance).sum())


def recall_of(queries: Tensor, scores: Tensor, rings: Sequence[Ring]) -> float:
    """The recall of a search in these rows, with queries (R, ..., D), that found these scores (R, ..., K).

    1.0 where there was nothing to find.
    """
    found = wanted = 0
    for row_queries, row_scores, ring in zip(queries.detach(), scores, rings, strict=True):
        heads, entries, width = ring.keys.shape
        if entries and row_queries.numel():
            grouped = row_queries.to(ring.keys.device, scores.dtype).reshape(heads, -1, width)
            best = best_of(grouped, ring.keys, scores.shape[-1]).scores
            here = row_scores.to(best.device).reshape(heads, -1, scores.shape[-1])[..., : best.shape[-1]]
            found, wanted = found + num_found(here, best), wanted + best.numel()
    return found / wanted if wanted else 1.0
