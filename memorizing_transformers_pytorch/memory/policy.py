"""Which entries are evicted when a row is full.

Shapes: N entries in the row, n new entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.store import Store

OLDEST, BY_DOCUMENT = "oldest", "by-document"
POLICIES = (OLDEST, BY_DOCUMENT)


def of_oldest_documents(store: Store, row: int, documents: Tensor) -> Tensor:
    """Which places (N,) bool of a row to empty before entries of these documents (n,) are written: all of the document
    whose first entry is oldest, and so on, until there is room. Documents among the new ones stay: their oldest entries
    are overwritten in turn."""
    order = store.places_in_order(row)
    owners = store.origins[row][order, 0]
    excess = min(len(owners) + len(documents) - store.capacity, len(owners))
    gone = torch.zeros_like(owners, dtype=torch.bool)
    ended = ~torch.isin(owners, documents.to(owners.device))
    while int(gone.sum()) < excess and bool((left := ended & ~gone).any()):
        gone |= owners == owners[left.nonzero()[0, 0]]
    return torch.zeros_like(gone).index_put_((order,), gone)
