"""How much of what should be found an index finds.

Shapes: R rows, G key/value heads, Q queries, K retrieved, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memorizing_transformers_pytorch.memory.index.exact import Best, Ring, best_of

_SAME_SCORE = 1e-5  # by which two float32 inner products, relative to the best, may differ and be the same


def num_found(scores: Tensor, best: Tensor) -> int:
    """How many of the found scores (..., K) are among the best (..., K).

    An entry as good as the last of the best counts as such: the same keys may be there several times.
    """
    tolerance = _SAME_SCORE * best.abs().amax(dim=-1, keepdim=True)
    return int((scores >= best[..., -1:] - tolerance).sum())


def share_found(found: Best, best: Best) -> float:
    """The recall: the share of the best entries that were found."""
    return num_found(found.scores, best.scores) / best.scores.numel()


def recall_of(queries: Tensor, scores: Tensor, rings: Sequence[Ring]) -> float:
    """The recall of a search in these rows, with queries (R, ..., D), that found these scores (R, ..., K).

    1.0 where there was nothing to find.
    """
    found = wanted = 0
    for row_queries, row_scores, ring in zip(queries.detach(), scores, rings, strict=True):
        heads, entries, width = ring.keys.shape
        if entries and row_queries.numel():
            grouped = row_queries.to(ring.keys.device, scores.dtype).reshape(heads, -1, width)
            best = best_of(grouped, ring.keys, scores.shape[-1]).scores
            here = row_scores.to(best.device).reshape(heads, -1, scores.shape[-1])[..., : best.shape[-1]]
            found, wanted = found + num_found(here, best), wanted + best.numel()
    return found / wanted if wanted else 1.0
