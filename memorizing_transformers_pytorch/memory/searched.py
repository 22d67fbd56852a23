"""Finding entries of a memory again, and what is known of them.

Shapes: R rows in scope, H query heads, G key/value heads, K retrieved, D head width.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

from memorizing_transformers_pytorch.memory import checks
from memorizing_transformers_pytorch.memory.index.exact import Index
from memorizing_transformers_pytorch.memory.index.recall import recall_of
from memorizing_transformers_pytorch.memory.index.structure import some
from memorizing_transformers_pytorch.memory.policy import LEAST_ATTENDED
from memorizing_transformers_pytorch.memory.retrieved import Lookup, Retrieved
from memorizing_transformers_pytorch.memory.scope import Scoped
from memorizing_transformers_pytorch.memory.store import Store


class Searched(Scoped):
    """The half of `KNNMemory` that changes nothing."""

    dim: int
    device: torch.device
    policy: str
    searcher: Index
    lock: threading.RLock

    def __init__(self, num_indices: int, num_kv_heads: int) -> None:
        super().__init__(num_indices)
        self.num_kv_heads = num_kv_heads
        self.seconds_searching = 0.0
        self._hidden: tuple[int, int, int] | None = None

    @property
    def store(self) -> Store:
        """The entries themselves."""
        raise NotImplementedError

    def retrieve(self, queries: Tensor, topk: int, *, rows: Sequence[int] | None = None) -> Retrieved:
        """The `topk` entries of its own row and head with the largest inner product, for each query.

        queries: (R, ..., D) for one key/value head, else (R, H, ..., D) with H a multiple of G.
        Returns slots, scores and mask, each (R, ..., topk), on the device of the queries. Keys and values stay where
        they are. Raises ValueError for other shapes or topk < 1, NonFiniteError for queries that are not finite.
        """
        chosen = self.scoped_indices if rows is None else rows
        checks.check_queries(queries, topk, len(chosen), self.num_kv_heads, self.dim)
        grouped = queries.detach().to(self.device).reshape(queries.shape[0], self.num_kv_heads, -1, self.dim)
        score_dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
        with self.lock:
            found = [self._search_row(row, own, topk, score_dtype) for row, own in zip(chosen, grouped, strict=True)]
        parts = (part[0] if len(part) == 1 else torch.stack(part) for part in zip(*found, strict=True))
        shape = (*queries.shape[:-1], topk)
        return Retrieved(*(part.view(shape).to(queries.device) for part in parts))

    def _search_row(self, row: int, queries: Tensor, topk: int, score_dtype: torch.dtype) -> Retrieved:
        """Search one row with queries (G, Q, D): slots, scores and mask, each (G, Q, topk)."""
        (heads, count, _), found = queries.shape, min(topk, self.store.filled[row])
        mask = queries.new_ones((heads, count, topk), dtype=torch.bool)
        if found == 0 or count == 0:
            nothing = queries.new_zeros(mask.shape, dtype=score_dtype)
            return Retrieved(nothing.long(), nothing, mask.logical_not_())
        best = self.searcher.search(self.store.ring(row), queries, topk)
        slots, scores = self._slots(row, best.places), best.scores.to(score_dtype)
        if found < topk:
            slots, scores = pad(slots, (0, topk - found)), pad(scores, (0, topk - found))
            mask[..., found:] = False
        return Retrieved(slots, scores, mask)

    def _slots(self, row: int, places: Tensor) -> Tensor:
        """Places (G, Q, K) in a row -> slots of the memory."""
        first, step = self.store.slot_base(row, 0), self.store.slot_base(0, 1)
        if len(places) == 1:
            return places + first
        bases = torch.arange(first, first + len(places) * step, step, device=places.device)
        return places + bases.view(-1, 1, 1)

    def look_up(
        self, queries: Tensor, topk: int, hidden_rows: Tensor | None = None, *, rows: Sequence[int] | None = None
    ) -> Lookup:
        """`retrieve`, with the keys and values behind it: what an attention layer needs, and its backward pass later.

        hidden_rows: (R,) or, for queries (R, ..., T, D), (R, T) bool; rows or tokens that shall find nothing.
        rows: R row numbers of the whole memory; those of the scope unless given.
        """
        began = time.perf_counter()
        with self.lock:
            retrieve = self.retrieve if self._hidden is None else self._others
            slots, scores, mask = retrieve(queries, topk, rows=rows)
            if self.policy == LEAST_ATTENDED:
                self.store.count_usage(slots.to(self.device)[mask.to(self.device)])
        self.seconds_searching += time.perf_counter() - began
        if hidden_rows is not None:
            count, *tokens = hidden_rows.shape
            shape = (count, *(1,) * (mask.ndim - 2 - len(tokens)), *tokens, 1)
            mask = mask & ~hidden_rows.to(mask.device).view(shape)
        for_backward = torch.is_grad_enabled()
        chosen = list(self.scoped_indices if rows is None else rows)
        return Lookup(self.store, chosen, Retrieved(slots, scores, mask), for_backward=for_backward)

    @contextmanager
    def hiding(self, document: int, first: int, last: int) -> Iterator[None]:
        """Inside, `look_up` finds the best of all entries but those of a document from position `first` to `last`: what
        a model would have found, had it not read these. (Slower: so many more entries are retrieved.)"""
        before, self._hidden = self._hidden, (document, first, last)
        try:
            yield
        finally:
            self._hidden = before

    def _others(self, queries: Tensor, topk: int, *, rows: Sequence[int] | None = None) -> Retrieved:
        """`retrieve`, but for what is hidden."""
        assert self._hidden is not None
        hidden = self._hides(self.store.origins).sum(dim=1).amax()
        slots, scores, mask = self.retrieve(queries, topk + int(hidden), rows=rows)
        mask = mask & ~self._hides(self.origins(slots))
        best = scores.masked_fill(~mask, -torch.inf).topk(topk, dim=-1).indices
        slots, scores, mask = (part.gather(-1, best) for part in (slots, scores, mask))
        return Retrieved(slots * mask, scores.masked_fill(~mask, 0), mask)

    def _hides(self, origins: Tensor) -> Tensor:
        """origins (..., 3) -> (...) bool."""
        assert self._hidden is not None
        document, first, last = self._hidden
        return (origins[..., 0] == document) & (origins[..., 1] >= first) & (origins[..., 1] <= last)

    def search(self, queries: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """`retrieve`, with copies of keys and values: key_values (R, ..., topk, 2, D) and mask (R, ..., topk).

        Where mask is False key_values is 0. Both are on the device of the queries. Of a memory of codes, the copies are
        the float32 numbers that these stand for.
        """
        with self.lock:
            slots, _, mask = self.retrieve(queries, topk)
            key_values = self.store.pairs_of(slots).to(queries.device)
        return key_values.masked_fill_(~mask[..., None, None], 0), mask

    def recall(self, queries: Tensor, topk: int, sample: int = 64) -> float:
        """The share of the truly best entries that the index finds for some of the queries.

        queries: as for `retrieve`, (R, ..., T, D). sample: how many of the T are tried, evenly spread.
        """
        if queries.ndim > (2 if self.num_kv_heads == 1 else 3):
            queries = some(queries, sample)
        found = self.retrieve(queries, topk)
        return recall_of(queries, found.scores, [self.store.ring(row) for row in self.scoped_indices])

    def origins(self, slots: Tensor) -> Tensor:
        """slots (...) -> (..., 3) int64: document id, position in the document, token id; -1 where not given."""
        num_slots = self.num_indices * self.num_kv_heads * self.store.room
        if slots.numel() > 0 and not (int(slots.min()) >= 0 and int(slots.max()) < num_slots):
            raise ValueError(f"expected slots from 0 to {num_slots - 1}, got {int(slots.min())} to {int(slots.max())}")
        return self.store.origins_of(slots).to(slots.device)
