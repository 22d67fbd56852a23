"""What a search of the memory gives back.

Shapes: B rows, H query heads, T queries, K retrieved, G key/value heads, D head width, N slots of a table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.vectors import Vectors

if TYPE_CHECKING:
    from memorizing_transformers_pytorch.memory.store import Store


class Origin(NamedTuple):
    """Where an entry comes from; -1 where that is not known."""

    document: int
    position: int
    token: int


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


class Table(NamedTuple):
    """Keys and values (N, D), and where in them the retrieved entries lie: slots (B, H, T, K).

    mask (B, H, T, K) says which of the entries lie in this table; None for all of them.
    """

    keys: Vectors
    values: Vectors
    slots: Tensor
    mask: Tensor | None


class _Kept(NamedTuple):
    """Copies of entries that were overwritten: their slots (n,), keys and values (n, D)."""

    slots: Tensor
    keys: Vectors
    values: Vectors


class Lookup:
    """A search result together with the keys and values behind it, as they were when it was made.

    The store is written in place, so entries that a forward pass found may be replaced before the backward pass needs
    them again; at capacity every segment does so. Just before that happens the store asks its lookups to keep copies
    (`keep`), of those few entries and only while a graph is alive. So a backward pass is right however late it comes.
    """

    def __init__(self, store: Store, rows: list[int], retrieved: Retrieved, *, for_backward: bool) -> None:
        self._store = store
        self._rows = rows
        self._clock = store.clock
        self._kept: list[_Kept] = []
        self._origins: Tensor | None = None
        self.slots, self.scores, self.mask = retrieved
        if for_backward:
            store.readers.add(self)

    def keep(self, row: int, places: slice) -> None:
        """Copy what these places of a row hold, if it was there when this lookup was made. Called by the store."""
        if row not in self._rows:
            return
        self._origins = self.origins()
        written = self._store.written[row, places]
        seen = ((written > 0) & (written <= self._clock)).nonzero().squeeze(-1) + places.start
        if seen.numel() > 0:
            heads = range(self._store.keys.shape[1])
            slots = torch.stack([self._store.slot_base(row, head) + seen for head in heads])
            keys, values = self._store.keys[row][:, seen], self._store.values[row][:, seen]
            self._kept.append(_Kept(slots.flatten(), keys.flatten(0, 1), values.flatten(0, 1)))

    def origins(self) -> Tensor:
        """Where the entries come from (B, H, T, K, 3); -1 where nothing was found."""
        if self._origins is not None:
            return self._origins
        return self._store.origins_of(self.slots).to(self.slots.device).masked_fill(~self.mask.unsqueeze(-1), -1)

    def tables(self) -> list[Table]:
        """The store, and after entries have been overwritten also the copies of those."""
        keys, values = self._store.keys.flatten(0, 2), self._store.values.flatten(0, 2)
        if not self._kept:
            return [Table(keys, values, self.slots, None)]
        all_slots, all_keys, all_values = zip(*self._kept, strict=True)
        kept = _Kept(torch.cat(all_slots), Vectors.cat(all_keys), Vectors.cat(all_values))
        sorted_slots, order = kept.slots.sort()
        slots = self.slots.to(sorted_slots.device)
        nearest = torch.searchsorted(sorted_slots, slots).clamp_max(sorted_slots.numel() - 1)
        moved = (sorted_slots[nearest] == slots) & self.mask.to(slots.device)
        there = torch.where(moved, order[nearest], 0)
        return [Table(keys, values, self.slots, ~moved), Table(kept.keys, kept.values, there, moved)]
