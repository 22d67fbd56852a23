"""Near-identical documents: licences, copies with a changed line, versions of one file.

A document is the set of its runs of five words. Two are near-identical if these sets have a Jaccard similarity of at
least the threshold. It is estimated by MinHash (Broder 1997) with 128 permutations, with a standard error of at most
0.045, for the pairs that locality-sensitive hashing proposes. What is near-identical to one of a group joins the group.
Kept in memory for each document: its name and some 600 bytes, of which 512 are its sketch; nothing of its text.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from memorizing_transformers_pytorch.data.document import TextDocument, text_bytes

_NUM_PERMUTATIONS = 128
_SHINGLE_WORDS = 5
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHINGLES_AT_ONCE = 4096
_SKETCHES_AT_ONCE = 4096
_PROPOSED = 0.999  # of the pairs at the threshold


def near_duplicate_leaders(documents: Iterable[TextDocument], threshold: float) -> dict[str, str]:
    """For every document with near-identical others, the smallest name of its group. Others are not in it."""
    names, sketches = _sketches(documents)
    groups = _Groups()
    different = np.ones(len(names), dtype=bool)
    for bucket in _buckets(sketches, np.arange(len(names))):
        same = bucket[(sketches[bucket] == sketches[bucket[0]]).all(axis=1)]
        different[same[1:]] = False
        for number in same[1:]:
            groups.join(names[same[0]], names[number])
    numbers = np.flatnonzero(different)
    bands, width = _bands(threshold)
    for start in range(0, bands * width, width):
        for bucket in _buckets(sketches[:, start : start + width], numbers):
            for left, right in _alike(sketches, bucket, threshold):
                groups.join(names[left], names[right])
    return groups.leaders()


def _sketches(documents: Iterable[TextDocument]) -> tuple[list[str], np.ndarray]:
    """The names of documents with words, and their sketches: a row of 32-bit numbers each."""
    names: list[str] = []
    rows = bytearray()  # grows in place
    for document in documents:
        shingles = _shingles(document.text)
        if len(shingles):
            names.append(document.name)
            rows += _sketch(shingles).tobytes()
    return names, np.frombuffer(rows, dtype=np.uint32).reshape(-1, _NUM_PERMUTATIONS)


def _buckets(columns: np.ndarray, numbers: np.ndarray) -> Iterator[np.ndarray]:
    """Those of the numbers whose rows are the same, in order, where there is more than one. Hashes may coincide."""
    hashes = np.zeros(len(numbers), dtype=np.uint64)
    for column in columns.T:
        hashes = _mixed(hashes, column[numbers])
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    ends = np.flatnonzero(np.append(hashes[1:] != hashes[:-1], True)) + 1
    starts = np.append(0, ends[:-1])
    several = ends - starts > 1
    for start, end in zip(starts[several], ends[several], strict=True):
        yield numbers[order[start:end]]


def _alike(sketches: np.ndarray, bucket: np.ndarray, threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs that connect what is near-identical within the bucket. Each document that has joined is not asked again."""
    left = bucket
    while len(left) > 1:
        found, left = left[:1], left[1:]
        while len(found) and len(left):
            one, found = found[0], found[1:]
            near = _similarities(sketches, one, left) >= threshold
            yield from ((one, other) for other in left[near])
            found, left = np.append(found, left[near]), left[~near]


def _similarities(sketches: np.ndarray, one: int, others: np.ndarray) -> np.ndarray:
    """Estimates of the Jaccard similarity of one document with others."""
    parts = (others[start : start + _SKETCHES_AT_ONCE] for start in range(0, len(others), _SKETCHES_AT_ONCE))
    return np.concatenate([(sketches[part] == sketches[one]).mean(axis=1) for part in parts])


def _mixed(hashes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The 64-bit hashes, each with one more number in it."""
    hashes = (hashes ^ numbers) * _HASH_FACTOR
    hashes ^= hashes >> np.uint64(29)
    return hashes


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
        mixed = _mixed(mixed, words[place : place + len(mixed)])
    return np.unique(mixed >> np.uint64(32))


def _sketch(shingles: np.ndarray) -> np.ndarray:
    from datasketch import MinHash  # type: ignore[import-untyped]  # imports scipy, which takes most of a second

    sketch = MinHash(num_perm=_NUM_PERMUTATIONS, hashfunc=int)
    numbers = iter(shingles.tolist())
    while some := list(islice(numbers, _SHINGLES_AT_ONCE)):
        sketch.update_batch(some)
    hashes: np.ndarray = sketch.hashvalues.astype(np.uint32)
    return hashes
