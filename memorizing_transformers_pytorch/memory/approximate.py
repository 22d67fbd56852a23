"""Finding most of the best entries without looking at all: FAISS structures that follow the rings of a memory.

Each row and key/value head has a structure of its own, in which the id of an entry is its place. Inverted lists (IVF)
take and forget single entries: they are brought up to date before every search. What cannot forget (HNSW, plain PQ) is
built anew now and then; until then entries that were overwritten are passed over, and newer ones searched exactly.
The scores are always those of the keys in the store. Centroids and codes are learned from what is remembered: by
inverted lists once for all rows, which hold keys of one layer, and again when the keys have drifted away from them or
are many more; by the others whenever they are built.

Shapes: G key/value heads, Q queries, N entries in the row, K retrieved, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.index import Best, Ring, best_of, inner_products
from memorizing_transformers_pytorch.memory.recall import share_found
from memorizing_transformers_pytorch.memory.structure import Kind, nearest, nearness, replace, set_knob, some

TARGET_RECALL = 0.95
SAMPLED_QUERIES = 128  # of each head, to measure the recall
SAMPLED_ENTRIES = 4_096  # of each head, to notice that keys have drifted
OUTGROWN = 4  # times as many entries in a row as there were in training call for other centroids
DRIFTED = 0.9  # as near to their centroids as they were, and the keys call for others
REBUILT_AFTER = 0.25  # of the ring has been written since


@dataclass
class _Training:
    """What was learned from a row with so many entries.

    templates: for each head a structure without entries. nearness: of the keys to their centroids, if it has any.
    effort, recall: as measured last, with so many queries of a head, in a row of so many entries.
    """

    templates: list[Any]
    entries: int
    nearness: float | None
    effort: int = 1
    recall: float = 0.0
    measured_with: int = 0
    measured_in: int = 0

    def nearness_of(self, keys: Tensor) -> float | None:
        """How near keys (G, N, D) are to the centroids."""
        heads = [nearness(template, head) for template, head in zip(self.templates, keys, strict=True)]
        known = [each for each in heads if each is not None]
        return sum(known) / len(known) if known else None

    def serves(self, entries: int, near: float | None) -> bool:
        """Whether it is good for a row of so many entries, so near to the centroids."""
        drifted = near is not None and self.nearness is not None and near < DRIFTED * self.nearness
        return entries < OUTGROWN * self.entries and not drifted


@dataclass
class _Row:
    """The structures of one row, which know the first `written` entries of this life of it.

    built_at: what `written` was when they were built. near: how near the keys that came of late are to the centroids.
    """

    life: int
    written: int
    training: _Training
    heads: list[Any]
    near: float | None
    built_at: int

    def takes(self, near: float | None, count: int, size: int) -> None:
        """Let `near` be a mean over about the last quarter of a ring of this size."""
        if near is not None and self.near is not None:
            self.near += min(count / (REBUILT_AFTER * size), 1.0) * (near - self.near)


class ApproximateIndex:
    """Any structure that `faiss.index_factory` can make, for inner products, on a CPU.

    factory: such as "IVF1024,SQfp16", "IVF4096,PQ32", "HNSW32". The number of lists to probe (or of nodes to visit) is
    the smallest power of two with which a sample of the queries finds 95% of its best entries, as measured against
    exact search after each training and whenever the row has doubled. Rows with fewer entries than training needs are
    searched exactly.

    Raises ValueError for a string that faiss does not know, or one that does not fit the width.
    """

    def __init__(self, dim: int, factory: str) -> None:
        self._kind = Kind(factory, dim)
        self._training: _Training | None = None
        self._rows: dict[int, _Row] = {}

    @property
    def recall(self) -> float | None:
        """As measured last; None before."""
        return self._training.recall if self._training is not None and self._training.measured_with else None

    @property
    def description(self) -> str:
        kind, training = self._kind, self._training
        if training is None:
            return f"{kind.factory} (exact below {kind.least_entries:,} entries)"
        effort = "" if kind.knob is None else f", {kind.knob} {training.effort}"
        return f"{kind.factory}{effort}, recall {training.recall:.3f}"

    def search(self, ring: Ring, queries: Tensor, topk: int) -> Best:
        """As `Index.search`."""
        if ring.keys.shape[1] < self._kind.least_entries:
            self._rows.pop(ring.row, None)
            return best_of(queries, ring.keys, topk)
        row = self.follow(ring)
        if self._must_measure(row.training, ring, queries):
            self._measure(row, ring, queries, topk)
        return self._search(row, ring, queries, topk)

    def follow(self, ring: Ring) -> _Row:
        """The structures of the row, up to date as far as they can be."""
        row = self._rows.get(ring.row)
        if row is None or row.life != ring.life or self._must_rebuild(row, ring):
            row = self._rows[ring.row] = self._built(ring)
        elif self._kind.takes_single and row.written < ring.written:
            self._take(row, ring)
        return row

    def _must_rebuild(self, row: _Row, ring: Ring) -> bool:
        """Never more often than once for a quarter of the ring, whatever is written."""
        size = ring.keys.shape[1]
        if ring.written - row.built_at <= REBUILT_AFTER * size:
            return False
        if self._kind.takes_single:
            return ring.written - row.written >= size or not row.training.serves(size, row.near)
        return True

    def _built(self, ring: Ring) -> _Row:
        """The structures of all that is in the row, with the last training if that serves, else with one of its own."""
        training, sample = self._training, some(ring.keys, SAMPLED_ENTRIES)
        shared = training is not None and self._kind.takes_single
        if training is None or not (shared and training.serves(ring.keys.shape[1], training.nearness_of(sample))):
            templates = [self._kind.trained(keys) for keys in ring.keys]
            training = self._training = _Training(templates, ring.keys.shape[1], None)
            training.nearness = training.nearness_of(sample)
        heads = [self._kind.filled(empty, keys) for empty, keys in zip(training.templates, ring.keys, strict=True)]
        return _Row(ring.life, ring.written, training, heads, training.nearness, ring.written)

    def _take(self, row: _Row, ring: Ring) -> None:
        """Put the newest entries in the place of those that they have overwritten."""
        places = _newest(ring, ring.written - row.written)
        for structure, keys in zip(row.heads, ring.keys, strict=True):
            replace(structure, places, keys[places])
        row.takes(row.training.nearness_of(ring.keys[:, places]), places.numel(), ring.keys.shape[1])
        row.written = ring.written

    def _search(self, row: _Row, ring: Ring, queries: Tensor, topk: int) -> Best:
        newest = _newest(ring, ring.written - row.written)
        found = [
            self._search_head(row.training.effort, structure, keys, newest, head_queries, topk)
            for structure, keys, head_queries in zip(row.heads, ring.keys, queries, strict=True)
        ]
        return Best(*(torch.stack(parts) for parts in zip(*found, strict=True)))

    def _search_head(
        self, effort: int, structure: Any, keys: Tensor, newest: Tensor, queries: Tensor, topk: int
    ) -> Best:
        """The best of what a structure finds and of the newest entries, which it does not know."""
        count = keys.shape[0]
        fetched = min(self._kind.fetched * topk + (topk if newest.numel() else 0), count)
        if self._kind.knob is not None:
            least = 1 if self._kind.num_lists else fetched  # a graph visits as many nodes as are wanted, or more
            set_knob(structure, self._kind.knob, max(effort, least))
        ids = nearest(structure, queries, fetched)
        places = ids.clamp(0, count - 1)
        usable = ids >= 0
        if newest.numel():
            overwritten = torch.zeros(count, dtype=torch.bool).index_fill(0, newest, True)
            late = newest[best_of(queries[None], keys[newest][None], topk).places[0]]
            places = torch.cat((places, late), dim=1)
            usable = torch.cat((usable & ~overwritten[places[:, :fetched]], torch.ones_like(late).bool()), dim=1)
        return _best_candidates(queries, keys, places, usable, min(topk, count))

    def _must_measure(self, training: _Training, ring: Ring, queries: Tensor) -> bool:
        grown = ring.keys.shape[1] >= 2 * training.measured_in
        return grown or training.measured_with < min(queries.shape[1], SAMPLED_QUERIES)

    def _measure(self, row: _Row, ring: Ring, queries: Tensor, topk: int) -> None:
        """Find the smallest effort that is enough for a sample of the queries."""
        training, sample = row.training, some(queries, SAMPLED_QUERIES)
        best = best_of(sample, ring.keys, topk)
        training.measured_with, training.measured_in = sample.shape[1], ring.keys.shape[1]
        training.effort, most = 1, self._kind.num_lists or ring.keys.shape[1]
        while True:
            training.recall = share_found(self._search(row, ring, sample, topk), best)
            if training.recall >= TARGET_RECALL or self._kind.knob is None or training.effort >= most:
                return
            training.effort = min(2 * training.effort, most)


def _newest(ring: Ring, count: int) -> Tensor:
    """The places of the entries that were written last."""
    size = ring.keys.shape[1]
    return (ring.cursor - 1 - torch.arange(min(count, size))) % size


def _best_candidates(queries: Tensor, keys: Tensor, places: Tensor, usable: Tensor, topk: int) -> Best:
    """The best of the usable places (Q, n), with the scores that their keys have; of too few, the best of all keys."""
    accumulate = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = inner_products(queries.to(accumulate), keys, places).masked_fill(~usable, -torch.inf)
    scores, order = scores.topk(topk, dim=-1)
    best = Best(scores, places.gather(1, order))
    too_few = (usable.sum(dim=1) < topk).nonzero().squeeze(1)
    if too_few.numel():
        whole = best_of(queries[too_few][None], keys[None], topk)
        best.scores[too_few], best.places[too_few] = whole.scores[0], whole.places[0]
    return best
