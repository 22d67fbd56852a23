"""Entries on their way into a store: checked and converted, so that storing them cannot fail.

Shapes: R rows, G key/value heads, N entries added, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import checks
from memorizing_transformers_pytorch.memory.entries import ORIGIN_FIELDS, UNKNOWN, StagedEntries
from memorizing_transformers_pytorch.memory.store import Store
from memorizing_transformers_pytorch.memory.vectors import Vectors


def staged(
    store: Store, rows: Sequence[int], memories: Tensor, mask: Tensor | None, origins: Tensor | None
) -> StagedEntries:
    """What `KNNMemory.add` stores in these rows, as it lies in the store. Raises ValueError as that does."""
    sizes = store.sizes
    memories = checks.checked_entries(memories, len(rows), sizes.kv_heads, sizes.dim)
    shape = len(rows), memories.shape[2]
    origins = torch.full((*shape, ORIGIN_FIELDS), UNKNOWN) if origins is None else origins
    origins = checks.checked_origins(mask, origins, shape, ORIGIN_FIELDS)
    floats = memories.detach().to(store.device, store.keys.float_dtype)
    checks.check_finite(floats, mask)
    keys, values = (Vectors.of(part, sizes.dtype) for part in floats.unbind(dim=-2))
    mask = None if mask is None else mask.to(store.device)
    return StagedEntries(list(rows), keys, values, origins.to(store.device), mask)
