"""Which spans of a text to recall: those around the places to which the finder attends.

Shapes: N entries in the order in which they were read, T query tokens, D width, P positions of what is recalled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SINKS = 8  # entries at the beginning of a document that are never a hit: they attract attention whatever they are
SMOOTHED = 17  # neighbours over which the attention is averaged
BLOCK = 4_096  # entries at a time, whose logits stay in the cache of a core


class Hit(NamedTuple):
    """A place that was found: an entry, and its score, the attention per entry averaged around it."""

    place: int
    score: float


class Chosen(NamedTuple):
    """places: (P,) which entries to recall, in order. hits: which of these were hits, the best first."""

    places: Tensor
    hits: list[Hit]

    def without(self, gone: Tensor) -> Chosen:
        """What is left when some of the entries, (P,) bool, are taken away. Nothing takes their place."""
        places, kept = self.places[~gone], [hit for hit in self.hits if not gone[hit.place]]
        return Chosen(places, _among(places, (hit._replace(place=int(self.places[hit.place])) for hit in kept)))


def attention(queries: Tensor, keys: Callable[[slice], Tensor], count: int, power: float = 1.0) -> Tensor:
    """Queries (T, D), scaled, and keys of so many entries, a slice (n, D) at a time -> (N,) how much of the attention
    each entry gets, to this power, averaged over the queries. A power below 1 asks rather that many queries attend to a
    place than that a few do so strongly.

    Two passes over the keys, so that no more than a block of logits is held at once; one where a block is enough.
    """
    blocks = [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]

    def logits(block: slice) -> Tensor:
        return queries @ keys(block).to(queries).mT

    if len(blocks) == 1:
        return logits(blocks[0]).softmax(dim=-1).pow(power).mean(dim=0)
    total = torch.stack([logits(block).logsumexp(dim=-1) for block in blocks]).logsumexp(dim=0)
    return torch.cat([((logits(block) - total[:, None]) * power).exp().mean(dim=0) for block in blocks])


def starts_of(documents: Tensor) -> Tensor:
    """Numbers of documents (N,) -> (N,) the place at which the document of each entry begins."""
    places = torch.arange(len(documents), device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[1:] = documents[1:] != documents[:-1]
    return torch.where(begins, places, 0).cummax(dim=0).values


def smoothed(weights: Tensor, starts: Tensor) -> Tensor:
    """(N,) how much attention the neighbourhood of each entry gets; nothing for the first entries of a document."""
    places = torch.arange(len(weights), device=weights.device)
    kept = torch.where(places - starts < SINKS, 0.0, weights)
    return F.avg_pool1d(kept[None, None], SMOOTHED, stride=1, padding=SMOOTHED // 2)[0, 0]


def hits(scores: Tensor, apart: int) -> Iterator[Hit]:
    """The places with the best scores (N,), the best first, each so far away from those before."""
    scores = scores.clone()
    while float(best := scores.max()) > 0:
        place = int(scores.argmax())
        yield Hit(place, float(best))
        scores[max(place - apart, 0) : place + apart + 1] = 0


def choose(scores: Tensor, starts: Tensor, count: int, span: int, first: int) -> Chosen:
    """Exactly `count` of N entries (or all, if there are no more): spans around hits, and the first entries of the
    document with the best one.

    span: how many entries around each hit, within its document. first: how many entries of the beginning come along.
    """
    total, found = len(scores), hits(scores, span // 2 + SMOOTHED // 2)
    if count >= total:
        every = torch.arange(total)
        return Chosen(every, _among(every, itertools.islice(found, 1)))
    taken, used = torch.zeros(total, dtype=torch.bool), list[Hit]()
    for hit in found:
        near = around(hit.place, starts, span)
        if not used:
            start = int(starts[hit.place])
            taken[start : min(start + first, int(near[-1]) + 1, start + count)] = True
        if (missing := count - int(taken.sum())) <= 0:
            break
        used.append(hit)
        new = near[~taken[near]]
        taken[new[(new - hit.place).abs().argsort(stable=True)[:missing]]] = True
    if (missing := count - int(taken.sum())) > 0:  # hits are used up: what was read last
        taken[(~taken).nonzero()[-missing:, 0]] = True
    places = taken.nonzero()[:, 0]
    return Chosen(places, _among(places, used))


def around(place: int, starts: Tensor, span: int) -> Tensor:
    """The entries (P,) around one, at most `span`, of its document alone."""
    start = int(starts[place])
    some = torch.arange(max(place - span // 2, start), min(place - span // 2 + span, len(starts)))
    return some[starts[some] == start]


def _among(places: Tensor, found: Iterable[Hit]) -> list[Hit]:
    """Hits, with their place among these."""
    return [Hit(int(torch.searchsorted(places, hit.place)), hit.score) for hit in found]
