"""One segment of each row before the layers: checked, packed, where documents begin and end, and what it searches.

Padding may stand anywhere in a segment. On entry the tokens of each row are packed to the left and on exit put back, so
that everything between sees rows that are full up to some length: causality hides the padding behind it, positions
are plain indices, and a convolution runs straight on from the segment before.

What does not fit a model is refused with a ValueError that names what was expected and what came.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from memorizing_transformers_pytorch.attention.attention import Search
from memorizing_transformers_pytorch.memory import ORIGIN_FIELDS, UNKNOWN, KNNMemory, KNNMemoryList, Lookup
from memorizing_transformers_pytorch.memory.entries import as_int64
from memorizing_transformers_pytorch.model.config import IGNORE_INDEX, ModelConfig

Item = TypeVar("Item")


class Segment(NamedTuple):
    """Tokens (B, T) packed to the left, their origins (B, T, 3), and for padded segments the mask (B, T) of real
    tokens and the order (B, T) in which the packed ones stood. starts (B, T): real tokens that begin a document, as
    the caller knows; None if there are none."""

    tokens: Tensor
    origins: Tensor
    mask: Tensor | None
    order: Tensor | None
    starts: Tensor | None = None

    def unpack(self, packed: Tensor) -> Tensor:
        """Put (B, T, ...) back to where the tokens stood."""
        return packed if self.order is None else reorder(packed, self.order.argsort(dim=-1), 1)


def make_segment(
    tokens: Tensor, mask: Tensor | None, origins: Tensor | None, pad_id: int | None, starts: Tensor | None = None
) -> Segment:
    """tokens (B, T), mask (B, T) bool, origins (B, T, 3), starts (B, T) bool -> a Segment.

    Without a mask, a run of pad_id at the end of a row is padding. Without origins only the token is known. Starts on
    padding are none.
    Raises ValueError for other shapes or dtypes, or an empty segment.
    """
    tokens = as_int64(tokens, "token ids")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"expected token ids (rows, at least 1), got {tuple(tokens.shape)}")
    for name, flags in (("mask", mask), ("starts", starts)):
        if flags is not None and (flags.dtype != torch.bool or flags.shape != tokens.shape):
            raise ValueError(f"expected bool {name} {tuple(tokens.shape)}, got {flags.dtype} {tuple(flags.shape)}")
    if origins is None:
        unknown = torch.full_like(tokens, UNKNOWN)
        origins = torch.stack((unknown, unknown, tokens), dim=-1)
    elif origins.shape != (*tokens.shape, ORIGIN_FIELDS):
        raise ValueError(f"expected origins {(*tokens.shape, ORIGIN_FIELDS)}, got {tuple(origins.shape)}")
    else:
        origins = as_int64(origins, "origins")
    order = None
    if mask is None:
        mask = _before_trailing(tokens, pad_id)
    elif bool(mask.all()):
        mask = None
    else:
        order = mask.logical_not().int().argsort(dim=-1, stable=True)
        tokens, origins, mask = (reorder(x, order, 1) for x in (tokens, origins, mask))
    if starts is not None:
        starts = _if_any(both(mask, reorder(starts, order, 1)))
    return Segment(tokens, origins, mask, order, starts)


def _before_trailing(tokens: Tensor, pad_id: int | None) -> Tensor | None:
    """False on the run of pad_id at the end of each row; None if there is none."""
    if pad_id is None or not bool((tokens[:, -1] == pad_id).any()):
        return None
    return (tokens != pad_id).flip(-1).cumsum(dim=-1).flip(-1) > 0


class Boundaries(NamedTuple):
    """Where documents begin and end. starts (B,), ends (B,): rows to be cleared before the search, and before
    storing; survives (B, T): tokens to be kept, those of the last document in each row. None for all.

    documents (B, T): to which document each token belongs, where some begin within the segment: 0 for the one that
    the past of the row belongs to. Tokens see their own only. None where all tokens of a row belong together.
    """

    starts: Tensor | None
    ends: Tensor | None
    survives: Tensor | None
    documents: Tensor | None = None


def find_boundaries(segment: Segment, config: ModelConfig) -> Boundaries:
    """A document begins with SOS and ends with EOS: of each row only what follows the last of either survives.

    It also begins where the caller says so (`segment.starts`), and these begin apart from what stands before.
    """
    starts = _where(segment, config.clear_memories_on_sos_token_id)
    ends = _where(segment, config.clear_memories_on_eos_token_id)
    survives = segment.mask
    if starts is not None:
        later = starts.flip(-1).cumsum(dim=-1).flip(-1) - starts.int()
        survives = both(survives, later == 0)
    if ends is not None:
        here_or_later = ends.flip(-1).cumsum(dim=-1).flip(-1)
        survives = both(survives, here_or_later == 0)
    starts, ends = (None if at is None else at.any(dim=-1) for at in (starts, ends))
    if segment.starts is None:
        return Boundaries(starts, ends, survives)
    starts = either(starts, _if_any(segment.starts[:, 0]))
    if not bool(segment.starts[:, 1:].any()):
        return Boundaries(starts, ends, survives)
    documents = segment.starts.cumsum(dim=-1)
    last = documents[:, -1:]
    return Boundaries(starts, either(ends, last.squeeze(-1) > 0), both(survives, documents == last), documents)


def _where(segment: Segment, token_id: int | None) -> Tensor | None:
    """Where (B, T) this token stands; None if nowhere."""
    return None if token_id is None else _if_any(both(segment.mask, segment.tokens == token_id))


def _if_any(at: Tensor) -> Tensor | None:
    return at if bool(at.any()) else None


def both(left: Tensor | None, right: Tensor) -> Tensor:
    """left & right, where None is True everywhere."""
    return right if left is None else left & right


def either(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """left | right, where None is False everywhere."""
    if left is None or right is None:
        return right if left is None else left
    return left | right


def hidden_from_memory(boundaries: Boundaries, hidden_rows: Tensor | None = None) -> Tensor | None:
    """Which rows (B,) or, where documents begin within the segment, which tokens (B, T) see no memory: those whose
    document is new, and of the hidden_rows (B,) all. None for none."""
    rows = either(boundaries.starts, hidden_rows)
    if boundaries.documents is None:
        return rows
    return either(boundaries.documents > 0, None if rows is None else rows.unsqueeze(1))


def shifted(items: Sequence[Item], places: int) -> list[Item]:
    """What each place reads when the i-th reads from the (i + places)-th, wrapping round (Ding et al. 2021)."""
    return [items[(i + places) % len(items)] for i in range(len(items))]


def make_look_ups(config: ModelConfig, memories: KNNMemoryList | None, hidden: Tensor | None) -> list[Search | None]:
    """For each memorizing layer a search of the memory that it reads; `hidden` rows or tokens find nothing."""
    if memories is None:
        return [None] * len(config.layers_with_memory)
    return [_search_once(memory, hidden) for memory in shifted(memories, config.shift_knn_memories_down)]


def _search_once(memory: KNNMemory, hidden: Tensor | None) -> Search:
    """A search of the rows in scope, done once: gradient checkpointing asks again after the memory has changed."""
    found: list[Lookup] = []
    rows = memory.scoped_indices

    def look_up(queries: Tensor, topk: int) -> Lookup:
        if not found:
            found.append(memory.look_up(queries, topk, hidden, rows=rows))
        return found[0]

    return look_up


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    """What is passed to the model lies where its weights do."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"expected {name} on {device}, got {tensor.device}")


def check_tokens(config: ModelConfig, x: Tensor, labels: Tensor | None) -> Tensor | None:
    """Token ids (int64) and labels lie in the vocabulary; labels may also be IGNORE_INDEX. Returns them as int64."""
    last = config.num_tokens - 1
    low, high = int(x.min()), int(x.max())
    if low < 0 or high > last:
        raise ValueError(f"expected token ids from 0 to {last}, got {low} to {high}")
    if labels is None:
        return None
    labels = as_int64(labels, "labels")
    if labels.shape != x.shape:
        raise ValueError(f"expected labels {tuple(x.shape)}, got {tuple(labels.shape)}")
    wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels > last))]
    if wrong.numel() > 0:
        raise ValueError(f"expected labels from 0 to {last}, or {IGNORE_INDEX}, got {int(wrong[0])}")
    return labels


def check_rows(flags: Tensor | None, batch_size: int) -> None:
    """A bool for each row, or None."""
    if flags is not None and (flags.dtype != torch.bool or flags.shape != (batch_size,)):
        raise ValueError(f"expected a bool for each of {batch_size} rows, got {flags.dtype} {tuple(flags.shape)}")


def check_memories(config: ModelConfig, memories: Sequence[KNNMemory] | None, batch_size: int) -> KNNMemoryList | None:
    """One memory per memorizing layer, of the model's shapes and dtype, with as many rows in scope as the batch has."""
    if memories is None:
        return None
    if len(memories) != len(config.layers_with_memory):
        raise ValueError(f"expected memories for {len(config.layers_with_memory)} layers, got {len(memories)}")
    expected = (config.dim_head, config.num_kv_heads, config.memory_dtype)
    for memory in memories:
        got = (memory.dim, memory.num_kv_heads, str(memory.dtype).removeprefix("torch."))
        if got != expected:
            raise ValueError(f"expected memories with (dim, key/value heads, dtype) {expected}, got {got}")
        if len(memory.scoped_indices) != batch_size:
            raise ValueError(f"expected memories with {batch_size} rows in scope, got {len(memory.scoped_indices)}")
        if memory.scoped_indices != memories[0].scoped_indices:
            rows = (memories[0].scoped_indices, memory.scoped_indices)
            raise ValueError(f"expected the same rows in scope of every memory, got {rows[0]} and {rows[1]}")
        _ = memory.store  # refuses a closed memory
    return memories if isinstance(memories, KNNMemoryList) else KNNMemoryList(memories)


def right_aligning(mask: Tensor) -> Tensor:
    """The order (B, n) that moves what is True to the right, keeping its sequence."""
    return mask.int().argsort(dim=-1, stable=True)


def reorder(x: Tensor, order: Tensor | None, dim: int) -> Tensor:
    """x (B, ..., n, ...) with the axis `dim` in this order (B, n); None leaves it."""
    if order is None:
        return x
    shape = [1] * x.ndim
    shape[0], shape[dim] = order.shape
    return torch.take_along_dim(x, order.view(shape), dim=dim)
