"""Choosing an index: by name, or by how many entries there are.

Shapes: G key/value heads, Q queries, N entries in the row, K retrieved, D head width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.index.approximate import ApproximateIndex
from memorizing_transformers_pytorch.memory.index.exact import Best, ExactIndex, Index, Ring, best_of

THRESHOLD = 8_192  # entries of a row
LEAST_PRODUCTS = 32_768  # queries times entries
LARGEST_SHARE = 1 / 4  # of the lists

log = logging.getLogger(__name__)


class AutoIndex:
    """Exact for small rows, inverted lists with float16 codes for large ones; no clock is read.

    A search is exact below 8,192 entries, and where queries times entries make less than 32,768. It is exact too where
    the lists would have to probe more than a quarter of themselves to find 95% of the best entries, as with random
    keys; that is tried again when the row has doubled. The same entries and queries give the same choice.

    Why these numbers (one CPU core, width 64; benchmarks/notes.md): with 512 queries and clustered keys both take as
    long at 4,096 entries, and lists a quarter of the time at 8,192. With one query exact search takes a third of the
    time at 8,192 entries, lists a third at 65,536. If all lists must be probed, exact search is 1.6 times as fast.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._approximate: ApproximateIndex | None = None
        self._decided_at = 0
        self._reason = f"below {THRESHOLD:,} entries"

    @property
    def description(self) -> str:
        """As `Index.description`."""
        return f"exact ({self._reason})" if self._approximate is None else self._approximate.description

    def search(self, ring: Ring, queries: Tensor, topk: int) -> Best:
        """As `Index.search`."""
        count = ring.keys.shape[1]
        if count < THRESHOLD or count * queries.shape[1] < LEAST_PRODUCTS:
            return best_of(queries, ring.keys, topk)
        if count >= 2 * self._decided_at:
            self._decided_at = count
            self._approximate = ApproximateIndex(self._dim, f"IVF{number_of_lists(count)},SQfp16")
        if self._approximate is None:
            return best_of(queries, ring.keys, topk)
        found = self._approximate.search(ring, queries, topk)
        if self._approximate.share_probed > LARGEST_SHARE:
            self._reason = f"too many lists to probe: {self._approximate.description}"
            self._approximate = None
            log.info("index: %s", self.description)
            return best_of(queries, ring.keys, topk)
        return found

    def forget(self, rows: Iterable[int] | None = None) -> None:
        """As `Index.forget`. The choice stays, for the documents to come."""
        if self._approximate is not None:
            self._approximate.forget(rows)


def number_of_lists(entries: int) -> int:
    """A power of two near 2 * sqrt(entries), so that each list holds at least 64 entries."""
    return int(2 ** max(min(round(math.log2(2 * math.sqrt(entries))), math.floor(math.log2(entries / 64))), 0))


def make_index(name: str, dim: int, device: torch.device) -> Index:
    """The index "exact" or "auto" (exact on a GPU), or inverted lists as faiss names them; others raise ValueError."""
    if name == "exact" or (name == "auto" and device.type != "cpu"):
        return ExactIndex()
    return AutoIndex(dim) if name == "auto" else ApproximateIndex(dim, name)
