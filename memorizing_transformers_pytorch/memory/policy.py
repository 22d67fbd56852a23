"""Which entries a full row evicts.

Shapes: N entries in the row, n new entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.store import Store

OLDEST, BY_DOCUMENT = "oldest", "by-document"
POLICIES = (OLDEST, BY_DOCUMENT)


def entries_to_remove(store: Store, row: int, documents: Tensor, policy: str) -> Tensor | None:
    """Which places (N,) bool of a row to empty before entries of these documents (n,) are written; None for none.

    "oldest": none, since new entries overwrite the oldest anyway. "by-document": the whole document whose first entry
    is oldest, then the next such document, until there is room. Documents that the new entries continue stay; their
    oldest entries are overwritten.
    """
    filled = store.filled[row]
    excess = min(filled + len(documents) - store.capacity, filled)
    if policy == OLDEST or excess <= 0:
        return None
    order = store.places_in_order(row)
    owners = store.origins[row][order, 0]
    chosen = torch.zeros_like(owners, dtype=torch.bool)
    ended = ~torch.isin(owners, documents.to(owners.device))
    while int(chosen.sum()) < excess and bool((left := ended & ~chosen).any()):
        chosen |= owners == owners[left.nonzero()[0, 0]]
    return torch.zeros_like(chosen).index_put_((order,), chosen)
