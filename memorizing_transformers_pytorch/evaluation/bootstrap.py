"""How far a mean over documents can be trusted: the percentile bootstrap (Efron 1979), with the document as its unit.

Tokens of a document depend on each other, so documents are drawn, with replacement. The mean is that over
all tokens of the documents drawn. Every mode is averaged over the same draws: differences between modes are paired.

Shapes: C modes, N documents, S draws.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MAX_BLOCK_NUMBERS = 2**22  # of draws held at once, which are as many numbers as there are documents


class Interval(NamedTuple):
    """Where the middle `level` of the draws lie."""

    low: float
    high: float


def drawn_means(sums: np.ndarray, counts: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> np.ndarray | None:
    """sums (C, N) of losses and counts (N,) of tokens, of each document -> means over all tokens of each draw (C, S).

    None for a single document, which says nothing about others. Raises ValueError for other shapes, documents without
    tokens, or less than one draw.
    """
    if sums.ndim != 2 or counts.shape != sums.shape[1:]:
        raise ValueError(f"expected sums (modes, documents) and counts (documents,), got {sums.shape}, {counts.shape}")
    if draws < 1:
        raise ValueError(f"expected at least 1 draw, got {draws}")
    number = len(counts)
    if number == 0 or counts.min() < 1:
        raise ValueError(f"expected documents with at least 1 token each, got {counts.tolist()}")
    if number == 1:
        return None
    random = np.random.default_rng(seed)
    parts = []
    block = max(MAX_BLOCK_NUMBERS // number, 1)
    for start in range(0, draws, block):
        taken = random.multinomial(number, np.full(number, 1 / number), size=min(block, draws - start))
        parts.append((sums @ taken.T) / (counts @ taken.T))
    return np.concatenate(parts, axis=1)


def interval(values: np.ndarray | None, level: float = 0.95) -> Interval | None:
    """The percentile interval of values (S,), one for each draw; None for None."""
    if values is None:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
