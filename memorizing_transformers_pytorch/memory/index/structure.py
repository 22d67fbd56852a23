"""The structures of FAISS that an approximate index is made of, and what each kind can do.

Shapes: N keys of one row and head, D head width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.vectors import Vectors

LEAST_ENTRIES = 1_024  # below, a row is searched exactly
LEAST_PER_LIST = 39  # as many keys faiss wants to learn a centroid from
TRAINED_PER_LIST = 64  # keys, if there are as many
HELD_OUT = 16  # one key in so many is not learned from, to tell how near others are to what was learned
CODEBOOK_NEEDS = LEAST_PER_LIST * 256
FETCHED_OF_CODES = 4  # times as many candidates are scored anew where a structure knows the keys only roughly
BLOCK_ENTRIES = 65_536
LARGEST = 65_504.0  # that float16 codes can hold

LONGEST, LARGEST_NUMBER = 200, 2**24  # of a factory string
_EXPECTED = "expected index to be 'exact', 'auto' or a faiss factory string"
_ROUGH = re.compile(r"PQ|RQ|LSQ|LSH|SQ[468]|RaBitQ|PCA|Refine")
_CODEBOOKS = re.compile(r"PQ|RQ|LSQ")


class Kind:
    """A kind of structure: what its factory string stands for.

    num_lists: of an inverted file; 0 for others. takes_single: whether entries can be added and removed one by one.
    fetched: how many times as many candidates to ask for as are wanted. least_entries: with fewer it cannot be trained.
    knob: the parameter by which it searches longer and finds more, if it has one.

    Raises ValueError for a string that faiss does not know, one that does not fit the width, or a structure that cannot
    be copied or numbers its entries itself.
    """

    def __init__(self, factory: str, dim: int) -> None:
        self.factory = factory
        self._dim = dim
        empty = self.empty()
        if isinstance(empty, faiss.IndexIDMap | faiss.IndexIDMap2) or not _can_be_copied(empty):
            raise ValueError(f"{_EXPECTED} whose structure can be copied and takes keys in order, got {factory!r}")
        lists = faiss.try_extract_index_ivf(empty)
        self.num_lists = 0 if lists is None else int(lists.nlist)
        self.takes_single = lists is not None and _can_forget(empty)
        self.fetched = FETCHED_OF_CODES if _ROUGH.search(factory) else 1
        codebooks = CODEBOOK_NEEDS if _CODEBOOKS.search(factory) else 0
        learned = max(LEAST_PER_LIST * self.num_lists, codebooks)
        self.least_entries = max(LEAST_ENTRIES, learned + learned // (HELD_OUT - 1) + 1)
        self.knob = "nprobe" if self.num_lists else "efSearch" if "HNSW" in factory else None

    def empty(self) -> Any:
        """A structure without entries or training."""
        numbers = map(int, re.findall(r"\d{1,20}", self.factory[:LONGEST]))
        if (
            len(self.factory) > LONGEST or max(numbers, default=0) > LARGEST_NUMBER
        ):  # faiss would crash, or fill the RAM
            got = f"{self.factory[:LONGEST]!r} ({len(self.factory):,} characters)"
            raise ValueError(f"{_EXPECTED} of at most {LONGEST} characters, numbers to {LARGEST_NUMBER:,}, got {got}")
        try:
            return faiss.index_factory(self._dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            reason = str(error).rsplit(": ", 1)[-1]
            raise ValueError(f"{_EXPECTED} for width {self._dim}, got {self.factory!r}: {reason}") from None

    def least_effort(self, fetched: int) -> int:
        """The smallest value of the knob: a list, or, in a graph, as many nodes as are wanted."""
        return 1 if self.num_lists else fetched

    def trained(self, keys: Vectors) -> Any:
        """A structure without entries that has learned from keys (N, D)."""
        structure = self.empty()
        lists: Any = faiss.try_extract_index_ivf(structure)
        if lists is not None:
            lists.cp.min_points_per_centroid = 1  # no warning: there are least_entries
        codes: Any = faiss.downcast_index(lists or getattr(structure, "index", structure))
        if hasattr(codes, "do_polysemous_training"):
            codes.do_polysemous_training = False  # of no use here, and slow
        structure.train(prepared(some_of(keys, max(TRAINED_PER_LIST * self.num_lists, CODEBOOK_NEEDS))))
        return structure

    def filled(self, template: Any, keys: Vectors) -> Any:
        """A copy of a trained structure, with keys (N, D) whose ids are their places."""
        structure = faiss.clone_index(template)
        if self.takes_single:
            _allow_single(structure)
        for ids, block in _blocks(keys):
            if self.takes_single:
                structure.add_with_ids(block, ids)
            else:
                structure.add(block)  # numbered in this order
        return structure


def replace(structure: Any, ids: Tensor, keys: Vectors) -> None:
    """Put keys (N, D) in the place of those that had these ids, if there were any."""
    structure.remove_ids(faiss.IDSelectorArray(ids.numpy()))
    structure.add_with_ids(prepared(keys), ids.numpy())


def nearest(structure: Any, queries: Tensor, count: int) -> Tensor:
    """The ids (Q, count) of what it finds for queries (Q, D); below 0 where it finds less."""
    return torch.from_numpy(structure.search(prepared(Vectors(queries)), count)[1])


def set_knob(structure: Any, knob: str, value: int) -> None:
    faiss.ParameterSpace().set_index_parameter(structure, knob, value)


def nearness(structure: Any, keys: Vectors) -> float | None:
    """How near keys (N, D) are to their best centroids, as a mean of cosines up to scale; None if there are none.

    It falls as keys drift away from those that the centroids were learned from.
    """
    lists, turned = faiss.try_extract_index_ivf(structure), prepared(keys)
    if lists is None:
        return None
    if isinstance(structure, faiss.IndexPreTransform):
        chain: Any = structure.chain
        for i in range(chain.size()):
            turned = chain.at(i).apply(turned)
    scores, _ = lists.quantizer.search(turned, 1)
    lengths = np.linalg.norm(turned, axis=1, keepdims=True)
    return float((scores / np.maximum(lengths, 1e-20)).mean())


def some(queries: Tensor, count: int) -> Tensor:
    """At most so many of the queries (..., N, D), evenly spread."""
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


def _allow_single(structure: Any) -> None:
    """Keep track of where each id lies, so that it can be removed in no time."""
    hashtable: Any = faiss.DirectMap.Hashtable  # type: ignore[attr-defined]
    faiss.extract_index_ivf(structure).set_direct_map_type(hashtable)


def _can_be_copied(structure: Any) -> bool:
    try:
        faiss.clone_index(structure)
    except RuntimeError:
        return False
    return True


def _can_forget(structure: Any) -> bool:
    """Whether ids can be removed, which faiss tells only when it is tried."""
    copy = faiss.clone_index(structure)
    try:
        _allow_single(copy)
        copy.remove_ids(faiss.IDSelectorArray(np.zeros(1, dtype=np.int64)))
    except RuntimeError:
        return False
    return True
