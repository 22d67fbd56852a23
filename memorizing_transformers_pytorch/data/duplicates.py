"""Near-identical documents: licences, copies with a changed line, versions of one file.

A document is the set of its runs of five words. Two are near-identical if these sets have a Jaccard similarity of at
least the threshold. It is estimated by MinHash (Broder 1997) with 128 permutations, with a standard error of at most
0.045, for the pairs that locality-sensitive hashing proposes. What is near-identical to one of a group joins the group.
Kept in memory for each document: its name and 128 numbers; nothing of its text.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from itertools import islice

import numpy as np
from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]

from memorizing_transformers_pytorch.data.document import Document
from memorizing_transformers_pytorch.data.text import text_bytes

_NUM_PERMUTATIONS = 128
_SHINGLE_WORDS = 5
_WORD_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHINGLES_AT_ONCE = 4096
_PROPOSED = 0.999  # of the pairs at the threshold


def near_duplicate_leaders(documents: Iterable[Document], threshold: float) -> dict[str, str]:
    """For every document with near-identical others, the smallest name of its group. Others are not in it."""
    groups = _Groups()
    index = MinHashLSH(threshold=threshold, num_perm=_NUM_PERMUTATIONS, params=_bands(threshold))
    sketches: dict[bytes, tuple[str, MinHash]] = {}
    for document in documents:
        shingles = _shingles(document.text)
        if not len(shingles):
            continue
        sketch = _sketch(shingles)
        key = sketch.hashvalues.tobytes()
        if key in sketches:
            groups.join(document.name, sketches[key][0])
            continue
        for candidate in index.query(sketch):
            name, other = sketches[candidate]
            if sketch.jaccard(other) >= threshold:
                groups.join(document.name, name)
        sketches[key] = document.name, sketch
        index.insert(key, sketch)
    return groups.leaders()


def _bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many numbers, one of which has to agree: the widest that propose nearly all pairs."""
    for width in range(_NUM_PERMUTATIONS // 2, 1, -1):
        bands = _NUM_PERMUTATIONS // width
        if 1 - (1 - threshold**width) ** bands >= _PROPOSED:
            return bands, width
    return _NUM_PERMUTATIONS, 1


class _Groups:
    """Names that belong together, each pointing towards the smallest of its group."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def join(self, left: str, right: str) -> None:
        first, second = sorted((self._leader(left), self._leader(right)))
        self._parents[second] = first
        self._parents[first] = first

    def leaders(self) -> dict[str, str]:
        return {name: self._leader(name) for name in list(self._parents)}

    def _leader(self, name: str) -> str:
        path = []
        while (parent := self._parents.setdefault(name, name)) != name:
            path.append(name)
            name = parent
        self._parents.update(dict.fromkeys(path, name))
        return name


def _shingles(text: str) -> np.ndarray:
    """A 32-bit hash of each run of words, without repetition; of a shorter text as a whole."""
    words = np.fromiter(map(zlib.crc32, text_bytes(text).split()), dtype=np.uint64)
    length = min(_SHINGLE_WORDS, len(words))
    if not length:
        return words
    mixed = np.zeros(len(words) - length + 1, dtype=np.uint64)
    for place in range(length):
        mixed = (mixed ^ words[place : place + len(mixed)]) * _WORD_FACTOR
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed >> np.uint64(32))


def _sketch(shingles: np.ndarray) -> MinHash:
    sketch = MinHash(num_perm=_NUM_PERMUTATIONS, hashfunc=int)
    numbers = iter(shingles.tolist())
    while some := list(islice(numbers, _SHINGLES_AT_ONCE)):
        sketch.update_batch(some)
    return sketch
