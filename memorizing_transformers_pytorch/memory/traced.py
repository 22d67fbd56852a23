"""Looking up as an operator of PyTorch, which `torch.compile` takes as it is: inside, nothing can be traced.

Shapes: R rows, H query heads, T queries, K retrieved, D head width.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_numbers = itertools.count(1)
_memories: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def number_for(memory: Any) -> int:
    """By which `look_up` knows this memory, as long as it lives."""
    number = next(_numbers)
    _memories[number] = memory
    return number


@torch.library.custom_op("memorizing_transformers::look_up", mutates_args=())
def look_up(
    queries: Tensor, memory: int, topk: int, hidden_rows: Tensor | None, rows: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`KNNMemory.look_up` of the memory with this number."""
    return tuple(_memories[memory].look_up(queries, topk, hidden_rows, rows=rows))


@look_up.register_fake
def _(
    queries: Tensor, memory: int, topk: int, hidden_rows: Tensor | None, rows: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = *queries.shape[:-1], topk
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    slots, scores = queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=dtype)
    return slots, scores, queries.new_empty(shape, dtype=torch.bool), torch.empty((), dtype=torch.int64)
