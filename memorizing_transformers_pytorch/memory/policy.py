"""Which entries make room when a row is full.

Shapes: N entries in the row, C places of a row, M capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.store import Store

OLDEST, LEAST_ATTENDED, BY_DOCUMENT = "oldest", "least-attended", "by-document"
POLICIES = (OLDEST, LEAST_ATTENDED, BY_DOCUMENT)
SHARE_AT_ONCE = 16  # "least-attended" takes out this part of a row at once: closing up moves all that stay


def entries_to_remove(store: Store, row: int, documents: Tensor, policy: str) -> Tensor | None:
    """Which places (N,) bool of a row to empty before entries of these documents (n,) are written; None for none.

    "oldest": none, as new entries replace the oldest anyway. "least-attended": of the older half those that were
    retrieved least often, of equals the oldest. "by-document": all of the document whose first entry is oldest, and so
    on; but of documents that go on, only the oldest entries, as they are overwritten.
    """
    filled, capacity = store.filled[row], store.capacity
    excess = min(filled + len(documents) - capacity, filled)
    if policy == OLDEST or excess <= 0:
        return None
    order = store.places_in_order(row)
    if policy == LEAST_ATTENDED:
        chosen = _least_attended(store.usage[row][order], max(excess, min(capacity // SHARE_AT_ONCE, filled)))
    else:
        chosen = _of_oldest_documents(store.origins[row][order, 0], documents.to(order.device), excess)
    gone = torch.zeros(filled, dtype=torch.bool, device=order.device)
    gone[order[chosen]] = True
    return gone


def _least_attended(usage: Tensor, count: int) -> Tensor:
    """Of entries (N,), the oldest first, the numbers of `count` that were used least among those of the older half."""
    candidates = usage[: max(len(usage) // 2, count)]
    return candidates.argsort(stable=True)[:count]


def _of_oldest_documents(owners: Tensor, going_on: Tensor, excess: int) -> Tensor:
    """Of entries (N,) of these documents, the oldest first, the numbers of those whose document must go."""
    gone = torch.zeros_like(owners, dtype=torch.bool)
    ended = ~torch.isin(owners, going_on)
    while int(gone.sum()) < excess and bool((left := ended & ~gone).any()):
        gone |= owners == owners[left.nonzero()[0, 0]]
    return gone.nonzero().squeeze(-1)
