"""Inverted lists of FAISS (IVF), the structures that an approximate index is made of.

They add and remove single entries, so they can follow a ring. The id of an entry is its place in the ring.

Which list a key is put in is learned from the keys, in one of two ways. By inner products: the list of a key is that of
the centroid with the largest product. Or for queries: keys lie in one list if their products with queries like those
seen are alike, so few lists hold the best keys for such a query. Which is better depends on the model (measured in
docs/memory.md): in pretrained ones queries vary along few of the dimensions in which keys do.

Shapes: G key/value heads, N keys of one row and head, Q queries, D head width.
"""

from __future__ import annotations

import re
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.entries import Vectors

LEAST_ENTRIES = 1_024  # below, a row is searched exactly
LEAST_PER_LIST = 39  # keys that faiss needs to learn a centroid
TRAINED_PER_LIST = 64  # keys to learn a centroid from, if there are as many,
LEAST_TRAINED = 10_000  # and in all
HELD_OUT = 16  # one key in so many is not learned from, to tell how near other keys are to the centroids
FETCHED_OF_CODES = 4  # times as many candidates are scored again where the codes are rough
BLOCK_ENTRIES = 65_536
LARGEST = 65_504.0  # that float16 codes can hold
PADDED = 8  # the codes of faiss are fast at multiples of this width
ROUNDS = 10  # of k-means, as faiss has them for lists

MOST_LISTS = 2**24
_LISTS = re.compile(r"IVF([1-9]\d{0,8}),(Flat|SQ4|SQ6|SQ8|SQbf16|SQfp16)")
_ROUGH = {"SQ4", "SQ6", "SQ8"}
_REMOVED = re.compile(r"(Flat|HNSW|IMI|IVF|LSH|LSQ|NSG|OPQ|PCA|PQ|RaBitQ|RQ|RR|SQ)[\w,()]{0,200}")


class Kind:
    """What an index string such as "IVF1024,SQfp16" stands for.

    num_lists: how many lists. fetched: how many times as many candidates to ask for as are wanted. least_entries: with
    fewer it cannot be trained.

    Raises ValueError for any other string.
    """

    def __init__(self, factory: str, dim: int) -> None:
        parts = _LISTS.fullmatch(factory)
        if parts is None or int(parts[1]) > MOST_LISTS:
            got = repr(factory) if len(factory) < 100 else f"{factory[:100]!r}... ({len(factory):,} characters)"
            raise ValueError(
                "expected index to be 'exact', 'auto' or inverted lists such as 'IVF1024,SQfp16' (1 to "
                f"{MOST_LISTS:,} lists; Flat, SQ4, SQ6, SQ8, SQbf16 or SQfp16), got {got}"
            )
        self.factory = factory
        self._dim = dim
        self.num_lists = int(parts[1])
        self.fetched = FETCHED_OF_CODES if parts[2] in _ROUGH else 1
        learned = LEAST_PER_LIST * self.num_lists
        self.least_entries = max(LEAST_ENTRIES, learned + learned // (HELD_OUT - 1) + 1)

    def trained(self, keys: Vectors) -> Lists:
        """Lists without entries, whose centroids (and codes) are learned from keys (N, D), by inner products."""
        structure: Any = faiss.index_factory(self._dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        structure.cp.min_points_per_centroid = 1  # no warning: there are least_entries
        structure.train(prepared(self._some_of(keys)))
        return Lists(_removable(structure))

    def trained_for(self, queries: Tensor, keys: Vectors) -> Lists:
        """The same for queries (Q, D) like these."""
        space, some = Space(queries), self._some_of(keys)
        placed = space.keys(some)
        means = faiss.Kmeans(self._dim, self.num_lists, niter=ROUNDS, min_points_per_centroid=1)
        means.train(placed[:, : self._dim].copy())
        structure: Any = faiss.index_factory(placed.shape[1], self.factory, faiss.METRIC_INNER_PRODUCT)
        structure.quantizer.add(space.centroids(torch.from_numpy(means.centroids)))
        structure.train(placed)  # the codes alone, if they need it: there are centroids
        return Lists(_removable(structure), space, spread=float(placed.var(axis=0).sum()))

    def _some_of(self, keys: Vectors) -> Vectors:
        return some_of(keys, max(TRAINED_PER_LIST * self.num_lists, LEAST_TRAINED))


class Space:
    """Where keys and queries lie in lists that are learned for queries (Q, D): moved so that their inner products stay
    as they are, and that the squared distance of two keys is how much their products with such a query differ, in the
    mean of squares. (Few queries count as if others of their size had come from all directions.)

    One more number is 1 for keys, 0 for queries and minus half of the squared length for centroids. So the centroid
    with the largest product is the nearest to a key, and for a query that whose keys have the largest products. The
    width is filled up with zeros to a multiple of 8: W.
    """

    def __init__(self, queries: Tensor) -> None:
        count, width = queries.shape
        numbers = queries.double()
        size = numbers.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        squares = (numbers.mT @ numbers / size + width * torch.eye(width)) / (count + width)
        root = torch.linalg.cholesky(squares)
        self._keys, self._queries = root.float(), torch.linalg.inv(root).mT.float()

    def keys(self, keys: Vectors) -> np.ndarray:
        """keys (N, D) -> (N, W)"""
        return _widened(_limited(keys.floats(torch.float32)) @ self._keys, 1.0)

    def queries(self, queries: Tensor) -> np.ndarray:
        """queries (Q, D) -> (Q, W)"""
        return _widened(queries.float() @ self._queries, 0.0)

    def centroids(self, means: Tensor) -> np.ndarray:
        """means (L, D) of keys that were moved -> (L, W)"""
        return _widened(means, -means.square().sum(dim=-1) / 2)


class Lists:
    """The lists of one head. space: None where keys and queries lie as they are; else spread is the mean squared
    distance, there, of the keys to their mean."""

    def __init__(self, structure: Any, space: Space | None = None, spread: float = 0.0) -> None:
        self.structure, self._space, self._spread = structure, space, spread

    def filled(self, keys: Vectors) -> Lists:
        """A copy of trained lists, with keys (N, D) whose ids are their places."""
        copy = Lists(faiss.clone_index(self.structure), self._space, self._spread)
        for start in range(0, keys.shape[0], BLOCK_ENTRIES):
            block = keys[start : start + BLOCK_ENTRIES]
            copy.structure.add_with_ids(copy._placed(block), np.arange(start, start + block.shape[0]))
        return copy

    def replace(self, ids: Tensor, keys: Vectors) -> None:
        """Put keys (N, D) in the place of those that had these ids, if there were any."""
        self.structure.remove_ids(faiss.IDSelectorArray(ids.numpy()))
        self.structure.add_with_ids(self._placed(keys), ids.numpy())

    def nearest(self, queries: Tensor, count: int, probes: int) -> Tensor:
        """The ids (Q, count) found for queries (Q, D) in so many lists; -1 where they hold fewer."""
        parameters: Any = faiss.SearchParametersIVF()
        parameters.nprobe = probes
        placed = prepared(Vectors(queries)) if self._space is None else self._space.queries(queries)
        return torch.from_numpy(self.structure.search(placed, count, params=parameters)[1])

    def nearness(self, keys: Vectors) -> float:
        """How near keys (N, D) are to their centroids: a mean of cosines up to scale; or, in lists for queries, the
        share of the spread of the keys that the centroids explain.

        It falls as keys drift away from those that the centroids were learned from.
        """
        numbers = self._placed(keys)
        scores, _ = self.structure.quantizer.search(numbers, 1)
        if self._space is None:
            lengths = np.linalg.norm(numbers, axis=1, keepdims=True)
            return float((scores / np.maximum(lengths, 1e-20)).mean())
        distances = np.square(numbers).sum(axis=1) - 1 - 2 * scores[:, 0]
        return 1.0 - float(distances.mean()) / max(self._spread, 1e-20)

    def _placed(self, keys: Vectors) -> np.ndarray:
        return prepared(keys) if self._space is None else self._space.keys(keys)


def _removable(structure: Any) -> Any:
    """Keep track of where each id lies, so that it is removed without a search for it."""
    structure.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
    return structure


def is_removed(index: str) -> bool:
    """Whether this names a structure of faiss that older versions served and this one does not."""
    return _LISTS.fullmatch(index) is None and _REMOVED.fullmatch(index) is not None


def some(queries: Tensor, count: int) -> Tensor:
    """At most `count` of the queries (..., N, D), evenly spread."""
    return some_of(Vectors(queries), count).numbers


def some_of(keys: Vectors, count: int) -> Vectors:
    """At most so many of the keys (..., N, D), evenly spread."""
    size = keys.shape[-2]
    places = torch.linspace(0, size - 1, min(count, size), dtype=torch.float64).round().long()
    return keys.at(places.to(keys.device))


def parted(keys: Vectors) -> tuple[Vectors, Vectors]:
    """Keys (G, N, D) to learn from, and those that are held out: the last of every 16, or the last of fewer."""
    size = keys.shape[1]
    held_out = torch.arange(size) % HELD_OUT == HELD_OUT - 1
    held_out[-1] |= size > 1 and not bool(held_out.any())
    return (keys, keys) if size == 1 else (keys[:, ~held_out], keys[:, held_out])


def prepared(keys: Vectors) -> np.ndarray:
    """As faiss takes them."""
    return _limited(keys.floats(torch.float32)).contiguous().numpy()


def _limited(numbers: Tensor) -> Tensor:
    return numbers.clamp(-LARGEST, LARGEST)


def _widened(vectors: Tensor, more: Tensor | float) -> np.ndarray:
    """Vectors (N, D) and one more number each -> (N, W)."""
    count, width = vectors.shape
    wide = vectors.new_zeros(count, -(-(width + 1) // PADDED) * PADDED)
    wide[:, :width], wide[:, width] = _limited(vectors), more
    return wide.numpy()
