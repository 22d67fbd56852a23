"""Inverted lists of FAISS (IVF), the structures that an approximate index is made of.

They add and remove single entries, so they can follow a ring. The id of an entry is its place in the ring.

Shapes: G key/value heads, N keys of one row and head, Q queries, D head width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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

    def trained(self, keys: Vectors) -> Any:
        """Lists without entries, whose centroids (and codes) are learned from keys (N, D)."""
        structure: Any = faiss.index_factory(self._dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        structure.cp.min_points_per_centroid = 1  # no warning: there are least_entries
        structure.train(prepared(some_of(keys, max(TRAINED_PER_LIST * self.num_lists, LEAST_TRAINED))))
        # Keep track of where each id lies, so that it is removed without a search for it.
        structure.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
        return structure


def is_removed(index: str) -> bool:
    """Whether this names a structure of faiss that older versions served and this one does not."""
    return _LISTS.fullmatch(index) is None and _REMOVED.fullmatch(index) is not None


def filled(template: Any, keys: Vectors) -> Any:
    """A copy of trained lists, with keys (N, D) whose ids are their places."""
    structure = faiss.clone_index(template)
    for ids, block in _blocks(keys):
        structure.add_with_ids(block, ids)
    return structure


def replace(structure: Any, ids: Tensor, keys: Vectors) -> None:
    """Put keys (N, D) in the place of those that had these ids, if there were any."""
    structure.remove_ids(faiss.IDSelectorArray(ids.numpy()))
    structure.add_with_ids(prepared(keys), ids.numpy())


def nearest(structure: Any, queries: Tensor, count: int, probes: int) -> Tensor:
    """The ids (Q, count) found for queries (Q, D) in so many lists; -1 where they hold fewer."""
    parameters: Any = faiss.SearchParametersIVF()
    parameters.nprobe = probes
    return torch.from_numpy(structure.search(prepared(Vectors(queries)), count, params=parameters)[1])


def nearness(structure: Any, keys: Vectors) -> float:
    """How near keys (N, D) are to their best centroids, as a mean of cosines up to scale.

    It falls as keys drift away from those that the centroids were learned from.
    """
    numbers = prepared(keys)
    scores, _ = structure.quantizer.search(numbers, 1)
    lengths = np.linalg.norm(numbers, axis=1, keepdims=True)
    return float((scores / np.maximum(lengths, 1e-20)).mean())


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
    return keys.floats(torch.float32).clamp(-LARGEST, LARGEST).contiguous().numpy()


def _blocks(keys: Vectors) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, keys.shape[0], BLOCK_ENTRIES):
        block = keys[start : start + BLOCK_ENTRIES]
        yield np.arange(start, start + block.shape[0]), prepared(block)
