"""Finding most of the best entries without looking at all: FAISS structures that follow the rings of a memory.

Each row and key/value head has a structure of its own, in which the id of an entry is its place. Inverted lists (IVF)
take and forget single entries: they are brought up to date before every search. What cannot forget (HNSW, plain PQ) is
built anew now and then; until then entries that were overwritten are passed over, and newer ones searched exactly.
The scores are always those of the keys in the store: where a structure keeps rough codes (SQ8, PQ), these only choose
candidates, which are ranked by their keys. That is the way to search compact codes and still rank exactly; a store that
itself keeps int8 has no exact keys to rank by. Centroids and codes are learned from what is remembered: by
inverted lists once for all rows, which hold keys of one layer, and again when the keys have drifted away from them or
are many more; by the others whenever they are built. How near new keys are to the centroids is compared with how near
those were from which they were not learned.

Shapes: G key/value heads, Q queries, N entries in the row, K retrieved, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.index.exact import Best, Ring, best_members, best_of, inner_products
from memorizing_transformers_pytorch.memory.index.recall import share_found
from memorizing_transformers_pytorch.memory.index.structure import (
    Kind,
    nearest,
    nearness,
    parted,
    replace,
    set_knob,
    some,
    some_of,
)
from memorizing_transformers_pytorch.memory.vectors import Vectors

TARGET_RECALL = 0.95
SAMPLED_QUERIES = 128  # of each head, to measure the recall
WORTHWHILE = 0.005  # of recall, for looking twice as far
TRIES = 2  # to look twice as far, without gaining that much: the codes are too rough for the target
SAMPLED_ENTRIES = 4_096  # of each head, to notice that keys have drifted
OUTGROWN = 4  # times as many entries in a row as there were in training call for other centroids
DRIFTED = 0.9  # as near to their centroids as they were, and the keys call for others
REBUILT_AFTER = 0.25  # of the ring has been written since


@dataclass
class _Training:
    """What was learned from a row with so many entries.

    templates: for each head a structure without entries. nearness: of the keys to their centroids, if it has any.
    effort, recall: as measured last, for so many entries per query, with so many queries of a head, in a row of so
    many entries.
    """

    templates: list[Any]
    entries: int
    nearness: float | None
    effort: int = 1
    recall: float = 0.0
    measured_for: int = 0
    measured_with: int = 0
    measured_in: int = 0

    def nearness_of(self, keys: Vectors) -> float | None:
        """How near keys (G, N, D) are to the centroids."""
        heads = [nearness(template, head) for template, head in zip(self.templates, keys, strict=True)]
        known = [each for each in heads if each is not None]
        return sum(known) / len(known) if known else None

    def measured(self, topk: int, queries: int, entries: int) -> bool:
        """Whether the effort was measured for as many as are wanted, with as many queries, in a row about as large."""
        return topk <= self.measured_for and queries <= self.measured_with and entries < 2 * self.measured_in

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
    def least_entries(self) -> int:
        """With fewer in a row, it is searched exactly."""
        return self._kind.least_entries

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
        if not row.training.measured(topk, min(queries.shape[1], SAMPLED_QUERIES), ring.keys.shape[1]):
            self._measure(row, ring, queries, topk)
        return self._search(row, ring, queries, topk)

    def forget(self, rows: Iterable[int] | None = None) -> None:
        """As `Index.forget`. What was learned stays, for the documents to come."""
        for row in list(self._rows) if rows is None else rows:
            self._rows.pop(row, None)

    def follow(self, ring: Ring) -> _Row:
        """The structures of the row, up to date as far as they can be."""
        row = self._rows.get(ring.row)
        if row is None or row.life != ring.life or self._must_rebuild(row, ring):
            row = self._rows[ring.row] = self._built(ring)
        elif self._kind.takes_single and row.written < ring.written:
            self.take(ring, ring.written - row.written)
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
        training, size = self._training, ring.keys.shape[1]
        near = None if training is None else training.nearness_of(some_of(ring.keys, SAMPLED_ENTRIES))
        if training is None or not (self._kind.takes_single and training.serves(size, near)):
            training = self._training = self._trained(ring.keys)
            near = training.nearness
        heads = [self._kind.filled(empty, keys) for empty, keys in zip(training.templates, ring.keys, strict=True)]
        return _Row(ring.life, ring.written, training, heads, near, ring.written)

    def _trained(self, keys: Vectors) -> _Training:
        """What can be learned from most of the keys (G, N, D), and how near the others are to it."""
        learned, held_out = parted(keys)
        training = _Training([self._kind.trained(head) for head in learned], keys.shape[1], None)
        training.nearness = training.nearness_of(some_of(held_out, SAMPLED_ENTRIES))
        return training

    def take(self, ring: Ring, count: int) -> None:
        """Put so many of the newest entries of a row in inverted lists, in the place of those they have overwritten."""
        row, places = self._rows[ring.row], _newest(ring, count)
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
        self, effort: int, structure: Any, keys: Vectors, newest: Tensor, queries: Tensor, topk: int
    ) -> Best:
        """The best of what a structure finds and of the newest entries, which it does not know."""
        count = keys.shape[0]
        fetched = min(self._kind.fetched * topk + (topk if newest.numel() else 0), count)
        if self._kind.knob is not None:
            set_knob(structure, self._kind.knob, max(effort, self._kind.least_effort(fetched)))
        ids = nearest(structure, queries, fetched)
        places, usable = ids.clamp(0, count - 1), ids >= 0
        if newest.numel():
            overwritten = torch.zeros(count, dtype=torch.bool).index_fill(0, newest, True)
            usable &= ~overwritten[places]
        too_few = usable.sum(dim=1) < min(topk, count - newest.numel())
        if newest.numel():
            late = newest[best_of(queries[None], keys[newest][None], topk).places[0]]
            places = torch.cat((places, late), dim=1)
            usable = torch.cat((usable, torch.ones_like(late).bool()), dim=1)
        best = _best_candidates(queries, keys, places, usable, min(topk, count))
        _search_anew(best, too_few, queries, keys)
        return best

    def _measure(self, row: _Row, ring: Ring, queries: Tensor, topk: int) -> None:
        """Find the smallest effort that is enough for a sample of the queries, or beyond which little is gained."""
        training, sample = row.training, some(queries, SAMPLED_QUERIES)
        best = best_of(sample, ring.keys, topk)
        training.measured_for, training.measured_with, training.measured_in = topk, sample.shape[1], ring.keys.shape[1]

        def recall(effort: int) -> float:
            training.effort = effort
            return share_found(self._search(row, ring, sample, topk), best)

        size = ring.keys.shape[1]
        most = 0 if self._kind.knob is None else self._kind.num_lists or size
        tried = chosen = self._kind.least_effort(min(self._kind.fetched * topk, size))
        training.recall, in_vain = recall(chosen), 0
        while training.recall < TARGET_RECALL and tried < most and in_vain < TRIES:
            tried, in_vain = min(2 * tried, most), in_vain + 1
            found = recall(tried)
            if found >= training.recall + WORTHWHILE:
                chosen, training.recall, in_vain = tried, found, 0
        training.effort = chosen


def _newest(ring: Ring, count: int) -> Tensor:
    """The places of the entries that were written last."""
    size = ring.keys.shape[1]
    return (ring.cursor - 1 - torch.arange(min(count, size))) % size


def _best_candidates(queries: Tensor, keys: Vectors, places: Tensor, usable: Tensor, topk: int) -> Best:
    """The best of the usable places (Q, n), with the scores that their keys have."""
    accumulate = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = inner_products(queries.to(accumulate), keys, places)
    return best_members(scores, places.masked_fill(~usable, -1), topk)


def _search_anew(best: Best, which: Tensor, queries: Tensor, keys: Vectors) -> None:
    """Replace what was found for these queries (Q,) by what exact search finds."""
    if bool(which.any()):
        whole = best_of(queries[which][None], keys[None], best.scores.shape[-1])
        best.scores[which], best.places[which] = whole.scores[0], whole.places[0]
