"""What a search of the memory gives back.

Shapes: B rows, H query heads, T queries, K retrieved.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from memorizing_transformers_pytorch.memory.lease import Table, lease_of


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


class Lookup(NamedTuple):
    """A search result that keeps what it found: slots, scores and mask as of `Retrieved`, and a lease.

    lease: () int64. While it lives, the keys, values and origins behind the slots can be read as they were, whatever is
        added, forgotten or removed meanwhile, by any thread.
    """

    slots: Tensor
    scores: Tensor
    mask: Tensor
    lease: Tensor

    def tables(self) -> list[Table]:
        """Copies of the keys and values behind the slots, each once: one table, whose slots are places in it."""
        return [lease_of(self.lease).copies(self.slots, self.mask)]

    def origins(self) -> Tensor:
        """(B, H, T, K, 3) int64: document id, position, token id of each entry; -1 where nothing was found."""
        return lease_of(self.lease).origins(self.slots).to(self.mask.device).masked_fill(~self.mask.unsqueeze(-1), -1)
