"""Finding most of the best entries without a scan of all: inverted lists of FAISS that follow the rings of a memory.

Each row and key/value head has lists of its own, in which the id of an entry is its place. Before every search they
take in the newest entries and drop those that were overwritten. The scores are always those of the keys in the store:
codes (SQ8) only choose candidates, which are ranked by their keys. Centroids and codes are learned once for all rows,
which hold keys of one layer, and again when the keys have drifted away from the centroids or are many more. Drift is
measured against keys that the centroids were not learned from. Where a search would have to read many lists, centroids
are learned for the queries too, and the better ones stay.

Shapes: G key/value heads, Q queries, N entries in the row, K retrieved, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.index.exact import (
    Best,
    Ring,
    best_members,
    best_of,
    inner_products,
    num_found,
)
from memorizing_transformers_pytorch.memory.index.structure import (
    Kind,
    Lists,
    parted,
    some,
    some_of,
)

TARGET_RECALL = 0.95
SAMPLED_QUERIES = 128  # of each head, to measure the recall
WORTHWHILE = 0.005  # more recall, for twice as many lists
MANY = 1 / 16  # of the lists
TRIES = 2  # times to probe twice as many lists without that gain: the codes are too rough for the target
SAMPLED_ENTRIES = 4_096  # of each head, to notice that keys have drifted
OUTGROWN = 4  # times as many entries in a row as there were in training call for other centroids
DRIFTED = 0.9  # times as near to the centroids as at first, and keys call for other centroids
REBUILT_AFTER = 0.25  # of the ring, written since it was built


@dataclass
class _Training:
    """What was learned from a row with `entries` entries.

    templates: for each head lists without entries. nearness: of the keys to their centroids. probes: how many lists a
    search reads. recall: with these, as measured last, for `measured_for` entries per query, with `measured_with`
    queries of a head, in a row of `measured_in` entries.
    """

    templates: list[Lists]
    entries: int
    nearness: float = 0.0
    probes: int = 1
    recall: float = 0.0
    measured_for: int = 0
    measured_with: int = 0
    measured_in: int = 0

    def nearness_of(self, keys: Vectors) -> float:
        """How near keys (G, N, D) are to the centroids."""
        heads = [template.nearness(head) for template, head in zip(self.templates, keys, strict=True)]
        return sum(heads) / len(heads)

    def measured(self, topk: int, queries: int, entries: int) -> bool:
        """Whether `probes` was measured for as many entries per query, as many queries, in a row about as large."""
        return topk <= self.measured_for and queries <= self.measured_with and entries < 2 * self.measured_in

    @property
    def rank(self) -> tuple[bool, int, float]:
        """Larger for what is better: enough recall, then fewer lists to read, then more recall."""
        return self.recall >= TARGET_RECALL, -self.probes, self.recall

    def serves(self, entries: int, near: float) -> bool:
        """Whether it is good for a row of so many entries, so near to the centroids."""
        return entries < OUTGROWN * self.entries and near >= DRIFTED * self.nearness


@dataclass
class _Row:
    """The lists of one row, one for each head, which know the first `written` entries of this epoch.

    built_at: what `written` was when they were built. near: how near the latest keys are to the centroids, a mean over
    about the last quarter of the ring.
    """

    epoch: int
    written: int
    training: _Training
    heads: list[Lists]
    near: float
    built_at: int


class ApproximateIndex:
    """Inverted lists, on a CPU.

    factory: such as "IVF1024,SQfp16"; see `Kind`. The number of lists to probe is the smallest power of two with which
    a sample of the queries finds 95% of its best entries, as measured against exact search after each training and
    whenever the row has doubled. Rows with fewer entries than training needs are searched exactly.

    Raises ValueError for another string.
    """

    def __init__(self, dim: int, factory: str) -> None:
        self._kind = Kind(factory, dim)
        self._training: _Training | None = None
        self._rows: dict[int, _Row] = {}

    @property
    def share_probed(self) -> float:
        """The share of the lists that a search reads, as measured last: 1 if fewer find too little, 0 before."""
        training = self._training
        if training is None or not training.measured_with:
            return 0.0
        return training.probes / self._kind.num_lists if training.recall >= TARGET_RECALL else 1.0

    @property
    def description(self) -> str:
        kind, training = self._kind, self._training
        if training is None:
            return f"{kind.factory} (exact below {kind.least_entries:,} entries)"
        return f"{kind.factory}, nprobe {training.probes}, recall {training.recall:.3f}"

    def search(self, ring: Ring, queries: Tensor, topk: int) -> Best:
        """As `Index.search`."""
        if ring.keys.shape[1] < self._kind.least_entries:
            self._rows.pop(ring.row, None)
            return best_of(queries, ring.keys, topk)
        row = self._follow(ring, queries, topk)
        if not row.training.measured(topk, min(queries.shape[1], SAMPLED_QUERIES), ring.keys.shape[1]):
            self._measure(row, ring, queries, topk)
        return self._search(row, ring, queries, topk)

    def forget(self, rows: Iterable[int] | None = None) -> None:
        """As `Index.forget`. What was learned stays, for the documents to come."""
        for row in list(self._rows) if rows is None else rows:
            self._rows.pop(row, None)

    def _follow(self, ring: Ring, queries: Tensor, topk: int) -> _Row:
        """The lists of the row, up to date."""
        row = self._rows.get(ring.row)
        if row is None or row.epoch != ring.epoch or _must_rebuild(row, ring):
            row = self._rows[ring.row] = self._built(ring, queries, topk)
        elif row.written < ring.written:
            _take_newest(row, ring)
        return row

    def _built(self, ring: Ring, queries: Tensor, topk: int) -> _Row:
        """The lists of all that is in the row, with the last training if that serves, else with one of its own."""
        if self._training is not None:
            near = self._training.nearness_of(some_of(ring.keys, SAMPLED_ENTRIES))
            if self._training.serves(ring.keys.shape[1], near):
                return _filled(ring, self._training, near)
        row = self._learned(ring, None)
        self._measure(row, ring, queries, topk)
        if row.training.recall < TARGET_RECALL or row.training.probes > MANY * self._kind.num_lists:
            other = self._learned(ring, queries)
            self._measure(other, ring, queries, topk)
            row = max(row, other, key=lambda each: each.training.rank)
        self._training = row.training
        return row

    def _learned(self, ring: Ring, queries: Tensor | None) -> _Row:
        """Lists whose centroids are learned from most of the keys of the row, for these queries if any; and how near
        the other keys are to them."""
        kind, (learned, held_out) = self._kind, parted(ring.keys)
        if queries is None:
            templates = [kind.trained(head) for head in learned]
        else:
            templates = [
                kind.trained_for(some(own, SAMPLED_ENTRIES), head) for own, head in zip(queries, learned, strict=True)
            ]
        training = _Training(templates, ring.keys.shape[1])
        training.nearness = training.nearness_of(some_of(held_out, SAMPLED_ENTRIES))
        return _filled(ring, training, training.nearness)

    def _search(self, row: _Row, ring: Ring, queries: Tensor, topk: int) -> Best:
        """The best that are in the probed lists; where these hold too few, the best of all entries."""
        best = self._in_lists(row, ring, queries, topk)
        for head, too_few in enumerate(best.places[..., -1] < 0):
            if bool(too_few.any()):
                whole = best_of(queries[head, too_few][None], ring.keys[head : head + 1], topk)
                best.scores[head, too_few], best.places[head, too_few] = whole.scores[0], whole.places[0]
        return best

    def _in_lists(self, row: _Row, ring: Ring, queries: Tensor, topk: int) -> Best:
        """The best that are in the probed lists, with the place -1 where these hold fewer."""
        size, found = ring.keys.shape[1], []
        for lists, keys, own in zip(row.heads, ring.keys, queries, strict=True):
            places = lists.nearest(own, min(self._kind.fetched * topk, size), row.training.probes)
            found.append(_best_candidates(own, keys, places, min(topk, size)))
        return Best(*(torch.stack(parts) for parts in zip(*found, strict=True)))

    def _measure(self, row: _Row, ring: Ring, queries: Tensor, topk: int) -> None:
        """Find the fewest lists that are enough for a sample of the queries, or beyond which little is gained."""
        training, sample = row.training, some(queries, SAMPLED_QUERIES)
        best = best_of(sample, ring.keys, topk)
        training.measured_for, training.measured_with, training.measured_in = topk, sample.shape[1], ring.keys.shape[1]

        def recall(probes: int) -> float:
            training.probes = probes
            found = self._in_lists(row, ring, sample, topk)  # alone: searching all entries takes long
            return num_found(found.scores.masked_fill(found.places < 0, -torch.inf), best.scores) / best.scores.numel()

        tried = chosen = 1
        training.recall, in_vain = recall(chosen), 0
        while training.recall < TARGET_RECALL and tried < self._kind.num_lists and in_vain < TRIES:
            tried, in_vain = min(2 * tried, self._kind.num_lists), in_vain + 1
            found = recall(tried)
            if found >= training.recall + WORTHWHILE:
                chosen, training.recall, in_vain = tried, found, 0
        training.probes = chosen


def _filled(ring: Ring, training: _Training, near: float) -> _Row:
    """Lists of all that is in the row."""
    heads = [empty.filled(keys) for empty, keys in zip(training.templates, ring.keys, strict=True)]
    return _Row(ring.epoch, ring.written, training, heads, near, ring.written)


def _must_rebuild(row: _Row, ring: Ring) -> bool:
    """Whether all was overwritten or the keys have changed; at most once for every quarter of the ring."""
    size = ring.keys.shape[1]
    if ring.written - row.built_at <= REBUILT_AFTER * size:
        return False
    return ring.written - row.written >= size or not row.training.serves(size, row.near)


def _take_newest(row: _Row, ring: Ring) -> None:
    """Put the entries written since the last search in the place of those that they have overwritten."""
    size = ring.keys.shape[1]
    count = min(ring.written - row.written, size)
    places = (ring.cursor - 1 - torch.arange(count)) % size
    for lists, keys in zip(row.heads, ring.keys, strict=True):
        lists.replace(places, keys[places])
    weight = min(count / (REBUILT_AFTER * size), 1.0)
    row.near += weight * (row.training.nearness_of(ring.keys[:, places]) - row.near)
    row.written = ring.written


def _best_candidates(queries: Tensor, keys: Vectors, places: Tensor, topk: int) -> Best:
    """The best of the places (Q, n), -1 for none, with the scores that their keys have."""
    accumulate = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = inner_products(queries.to(accumulate), keys, places.clamp_min(0))
    return best_members(scores, places, topk)
