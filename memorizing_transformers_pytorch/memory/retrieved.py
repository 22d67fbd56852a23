"""What a search of the memory gives back.

Shapes: B rows, H query heads, T queries, K retrieved, D head width.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from memorizing_transformers_pytorch.memory.store import Store


class Retrieved(NamedTuple):
    """The entries found for each query, best first; no copies of keys or values.

    slots: (rows, ..., K) int64. Where each entry lies in the memory: a slot names its row, key/value head and
        place in the ring, so it indexes `keys.flatten(0, 2)` of the store directly. 0 where nothing was found.
    scores: (rows, ..., K) float32 (float64 for float64 queries). The inner product of query and stored key;
        0 where nothing was found.
    mask: (rows, ..., K) bool. False where the row holds fewer than K entries.
    """

    slots: Tensor
    scores: Tensor
    mask: Tensor


class Lookup:
    """A search result together with the keys and values behind it, for as long as those lie unchanged.

    The store is written in place, so what a slot holds may be replaced between the forward pass that found it
    and the backward pass that needs it again. `keys` and `values` notice that: they give the whole table of the
    memory, as (slots, D), or raise RuntimeError where a retrieved slot has been overwritten since the search.
    """

    def __init__(self, store: Store, retrieved: Retrieved) -> None:
        self._store = store
        self._clock = store.clock
        self.slots, self.scores, self.mask = retrieved

    def keys(self) -> Tensor:
        self._store.require_unchanged(self.slots, self.mask, since=self._clock)
        return self._store.keys.flatten(0, 2)

    def values(self) -> Tensor:
        self._store.require_unchanged(self.slots, self.mask, since=self._clock)
        return self._store.values.flatten(0, 2)

    def hide(self, rows: Tensor) -> Lookup:
        """The same search, with nothing found for the rows that are True in `rows` (B,)."""
        shown = copy.copy(self)
        shown.mask = self.mask & ~rows.to(self.mask.device).view(-1, *(1,) * (self.mask.ndim - 1))
        return shown
