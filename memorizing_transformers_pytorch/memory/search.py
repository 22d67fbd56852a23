"""Searching rows of a store: the entries with the largest inner products, for every query of its own row and head.

Shapes: R rows, H query heads, G key/value heads, T queries, Q of them of a key/value head, K retrieved, D head width.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from memorizing_transformers_pytorch.memory.checks import NonFiniteError
from memorizing_transformers_pytorch.memory.index.exact import Index
from memorizing_transformers_pytorch.memory.lease import Retrieved
from memorizing_transformers_pytorch.memory.store import Store


class Hidden(NamedTuple):
    """Entries that a search shall not find: those of a document from position `first` to `last`."""

    document: int
    first: int
    last: int

    def among(self, origins: Tensor) -> Tensor:
        """origins (..., 3) -> (...) bool."""
        position = origins[..., 1]
        return (origins[..., 0] == self.document) & (position >= self.first) & (position <= self.last)


def search_rows(
    store: Store, index: Index, rows: Sequence[int], queries: Tensor, topk: int, hidden: Hidden | None = None
) -> Retrieved:
    """The best entries of these rows for queries (R, ..., D): slots, scores and mask, each (R, ..., topk)."""
    _check_queries(queries, topk, len(rows), store.sizes.kv_heads, store.sizes.dim)
    if hidden is not None:
        return _search_others(store, index, rows, queries, topk, hidden)
    grouped = queries.detach().to(store.device).reshape(len(rows), store.sizes.kv_heads, -1, queries.shape[-1])
    found = [_search_row(store, index, row, own, topk) for row, own in zip(rows, grouped, strict=True)]
    parts = (part[0] if len(part) == 1 else torch.stack(part) for part in zip(*found, strict=True))
    return Retrieved(*(part.view(*queries.shape[:-1], topk).to(queries.device) for part in parts))


def _check_queries(queries: Tensor, topk: int, rows: int, heads: int, dim: int) -> None:
    """queries (R, ..., D) for one key/value head, else (R, H, ..., D) with H a multiple of `heads`; topk >= 1."""
    fits = queries.ndim >= 2 and queries.shape[0] == rows and queries.shape[-1] == dim
    if heads > 1:
        fits = fits and queries.ndim >= 3 and queries.shape[1] % heads == 0
    if not fits:
        middle = "..." if heads == 1 else f"query heads as a multiple of {heads}, ..."
        raise ValueError(f"expected queries ({rows} rows, {middle}, {dim}), got {tuple(queries.shape)}")
    if not queries.is_floating_point():
        raise ValueError(f"expected floating-point queries, got {queries.dtype}")
    if topk < 1:
        raise ValueError(f"expected topk to be at least 1, got {topk}")
    # Not on a GPU, which it would wait for. NaN for NaN and infinity; in two steps, this is done often.
    if queries.device.type == "cpu" and (queries.detach() * 0).sum().item() != 0:
        raise NonFiniteError("expected finite queries, got NaN or infinity")


def _search_row(store: Store, index: Index, row: int, queries: Tensor, topk: int) -> Retrieved:
    """Search one row with queries (G, Q, D): slots, scores and mask, each (G, Q, topk)."""
    (heads, count, _), found = queries.shape, min(topk, store.filled[row])
    score_dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    mask = queries.new_ones((heads, count, topk), dtype=torch.bool)
    if found == 0 or count == 0:
        nothing = queries.new_zeros(mask.shape, dtype=score_dtype)
        return Retrieved(nothing.long(), nothing, mask.logical_not_())
    best = index.search(store.ring(row), queries, topk)
    slots, scores = _slots(store, row, best.places), best.scores.to(score_dtype)
    if found < topk:
        slots, scores = pad(slots, (0, topk - found)), pad(scores, (0, topk - found))
        mask[..., found:] = False
    return Retrieved(slots, scores, mask)


def _slots(store: Store, row: int, places: Tensor) -> Tensor:
    """Places (G, Q, K) in a row -> slots of the memory."""
    first, step = store.slot_base(row, 0), store.slot_base(0, 1)
    if len(places) == 1:
        return places + first
    bases = torch.arange(first, first + len(places) * step, step, device=places.device)
    return places + bases.view(-1, 1, 1)


def _search_others(
    store: Store, index: Index, rows: Sequence[int], queries: Tensor, topk: int, hidden: Hidden
) -> Retrieved:
    """`search_rows`, as if the hidden entries were not there: so many more entries are retrieved."""
    most = max(int(hidden.among(store.origins[row, : store.filled[row]]).sum()) for row in rows)
    slots, scores, mask = search_rows(store, index, rows, queries, topk + most)
    mask = mask & ~hidden.among(store.origins_of(slots)).to(mask.device)
    best = scores.masked_fill(~mask, -torch.inf).topk(topk, dim=-1).indices
    slots, scores, mask = (part.gather(-1, best) for part in (slots, scores, mask))
    return Retrieved(slots * mask, scores.masked_fill(~mask, 0), mask)


def without_rows(found: Retrieved, hidden_rows: Tensor) -> Retrieved:
    """Nothing for the rows (R,) or, of queries (R, ..., T, D), the tokens (R, T) where hidden_rows is True."""
    rows, *tokens = hidden_rows.shape
    shape = (rows, *(1,) * (found.mask.ndim - 2 - len(tokens)), *tokens, 1)
    return found._replace(mask=found.mask & ~hidden_rows.to(found.mask.device).view(shape))


_numbers = itertools.count(1)
_memories: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def number_for(memory: Any) -> int:
    """By which `traced_look_up` knows this memory, as long as it lives."""
    number = next(_numbers)
    _memories[number] = memory
    return number


@torch.library.custom_op("memorizing_transformers::look_up", mutates_args=())
def traced_look_up(
    queries: Tensor, memory: int, topk: int, hidden_rows: Tensor | None, rows: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`KNNMemory.look_up` of the memory with this number, as an operator that `torch.compile` takes as it is."""
    return tuple(_memories[memory].look_up(queries, topk, hidden_rows, rows=rows))


@traced_look_up.register_fake
def _(
    queries: Tensor, memory: int, topk: int, hidden_rows: Tensor | None, rows: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = *queries.shape[:-1], topk
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    slots, scores = queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=dtype)
    return slots, scores, queries.new_empty(shape, dtype=torch.bool), torch.empty((), dtype=torch.int64)
