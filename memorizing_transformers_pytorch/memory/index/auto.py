"""Choosing an index, by name or by what searching costs on this machine.

Shapes: G key/value heads, Q queries, N entries in the row, K retrieved, D head width.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.index.approximate import TARGET_RECALL, ApproximateIndex
from memorizing_transformers_pytorch.memory.index.exact import Best, ExactIndex, Index, Ring, best_of

WORTH_TRYING = 8_192  # entries; a smaller row is scanned faster than anything could be built

RUNS = 3  # of each index when they are compared,
ENOUGH_SECONDS = 0.3  # unless they take longer

log = logging.getLogger(__name__)


class AutoIndex:
    """Exact, until on the machine at hand an approximate index is faster, its upkeep included, and finds enough.

    When a row first has 8,192 entries, and whenever it has doubled since, both answer the same queries. Inverted lists
    with float16 codes, one for about sqrt(N) / 2 entries but at least 64, are used from then on if they were faster
    with a recall of 95%. The choice depends on times, so two runs may choose differently. It is logged, and said by
    `description`.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._approximate: ApproximateIndex | None = None
        self._decided_at = 0
        self._seen: dict[int, tuple[int, int]] = {}  # of each row: the life, and how many entries it had been given
        self.description = f"exact, below {WORTH_TRYING:,} entries"

    def search(self, ring: Ring, queries: Tensor, topk: int) -> Best:
        """As `Index.search`."""
        count, new = ring.keys.shape[1], self._new(ring, queries.shape[1])
        if count >= max(2 * self._decided_at, WORTH_TRYING):
            return self._decide(ring, queries, topk, new)
        if self._approximate is None or count < WORTH_TRYING:
            return best_of(queries, ring.keys, topk)
        return self._approximate.search(ring, queries, topk)

    def forget(self, rows: Iterable[int] | None = None) -> None:
        """As `Index.forget`. The choice stays, for the documents to come."""
        for row in list(self._seen) if rows is None else rows:
            self._seen.pop(row, None)
        if self._approximate is not None:
            self._approximate.forget(rows)

    def _new(self, ring: Ring, queries: int) -> int:
        """How many entries the row was given since it was last searched; taken to be as many as the first queries."""
        life, written = self._seen.get(ring.row, (0, 0))
        self._seen[ring.row] = ring.life, ring.written
        return min(ring.written - written if life == ring.life else queries, ring.keys.shape[1])

    def _decide(self, ring: Ring, queries: Tensor, topk: int, new: int) -> Best:
        """Let both search, and keep the cheaper one: its upkeep is to take in the new entries before each search."""
        count = self._decided_at = ring.keys.shape[1]
        candidate = ApproximateIndex(self._dim, f"IVF{number_of_lists(count)},SQfp16")
        candidate.search(ring, queries, topk)  # builds it, and measures how far it must look

        def look_up() -> Best:
            if count >= candidate.least_entries:
                candidate.take(ring, new)
            return candidate.search(ring, queries, topk)

        approximate, found = _fastest(look_up)
        exact, best = _fastest(lambda: best_of(queries, ring.keys, topk))
        recall = candidate.recall
        chosen = approximate < exact and recall is not None and recall >= TARGET_RECALL
        self._approximate = candidate if chosen else None
        times = f"{exact / approximate:.1f} times as fast at {count:,} entries"
        if chosen:
            self.description = f"{candidate.description} (against exact {times})"
        else:
            self.description = f"exact ({candidate.description}, was {times})"
        log.info("index: %s", self.description)
        return found if chosen else best


def _fastest(search: Callable[[], Best]) -> tuple[float, Best]:
    """The seconds that it takes, of as many runs as a short time allows: other work may disturb some of them."""
    times: list[float] = []
    while not times or (len(times) < RUNS and sum(times) < ENOUGH_SECONDS):
        began = time.perf_counter()
        best = search()
        times.append(time.perf_counter() - began)
    return min(times), best


def number_of_lists(entries: int) -> int:
    """A power of two near 2 * sqrt(entries), of which each gets 64 entries or more."""
    return int(2 ** max(min(round(math.log2(2 * math.sqrt(entries))), math.floor(math.log2(entries / 64))), 0))


def make_index(name: str, dim: int, device: torch.device) -> Index:
    """The index "exact" or "auto" (exact on a GPU), or inverted lists as faiss names them. Raises ValueError for another
    name."""
    if name == "exact" or (name == "auto" and device.type != "cpu"):
        return ExactIndex()
    return AutoIndex(dim) if name == "auto" else ApproximateIndex(dim, name)


def index_on(device: torch.device, name: str) -> str:
    """The name of an index that was made elsewhere, where structures of faiss need a CPU: "exact" instead of one."""
    return name if device.type == "cpu" or name == "auto" else "exact"
