"""One segment's dealings with the memories: search them before, store in them after; all layers together or none.

Shapes: B rows, T tokens, G key/value heads, K retrieved, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from memorizing_transformers_pytorch.attention.attention import Search
from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList, Lookup
from memorizing_transformers_pytorch.model.config import ModelConfig
from memorizing_transformers_pytorch.model.segment import (
    Boundaries,
    Segment,
    XLMemories,
    either,
    reorder,
    right_aligning,
)

Item = TypeVar("Item")


class Written(NamedTuple):
    """What a segment leaves: the pairs of each layer (B, G, T, 2, D), the inputs of each convolution (B, T, C)."""

    pairs: list[Tensor]
    conv_inputs: list[Tensor]


def shifted(items: Sequence[Item], places: int) -> list[Item]:
    """What each place reads when the i-th reads from the (i + places)-th, wrapping round (Ding et al. 2021)."""
    return [items[(i + places) % len(items)] for i in range(len(items))]


def hidden_from_memory(boundaries: Boundaries, hidden_rows: Tensor | None = None) -> Tensor | None:
    """Which rows (B,) or, where documents begin within the segment, which tokens (B, T) see no memory: those whose
    document is new, and of the hidden_rows (B,) all. None for none."""
    rows = either(boundaries.starts, hidden_rows)
    if boundaries.documents is None:
        return rows
    return either(boundaries.documents > 0, None if rows is None else rows.unsqueeze(1))


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


def hand_over(
    config: ModelConfig,
    segment: Segment,
    boundaries: Boundaries,
    state: XLMemories,
    written: Written,
    memories: KNNMemoryList | None,
) -> XLMemories:
    """After a segment: clear rows whose document ended, store what leaves the local context, return the next state.

    Without XL memory a layer stores the pairs of the segment, with it those that XL memory discards. Everything is
    checked before the first memory changes.
    """
    ended = either(boundaries.starts, boundaries.ends)
    past = state if ended is None else state.cleared(ended)
    xl_pairs = [written.pairs[number - 1] for number in config.layers_with_xl]
    new, discarded = roll(past, xl_pairs, segment.origins, boundaries.survives, config.num_kv_pairs_kept)
    new.conv_states = [
        roll_convolution(old, inputs, boundaries.survives)
        for old, inputs in zip(past.conv_states, written.conv_inputs, strict=True)
    ]
    if memories:
        leaving = dict(zip(config.layers_with_xl, discarded.pairs, strict=True))
        staged = [
            memory.stage(leaving[number], discarded.mask, discarded.origins)
            if number in leaving
            else memory.stage(written.pairs[number - 1], boundaries.survives, segment.origins)
            for memory, number in zip(memories, config.layers_with_memory, strict=True)
        ]
        with memories.locked():
            if ended is not None:
                memories.clear_memory(torch.tensor(memories[0].scoped_indices)[ended.cpu()].tolist())
            memories.commit(staged)
    return new


class Discarded(NamedTuple):
    """What XL memory no longer holds: pairs of each layer (B, G, n, 2, D), which are real (B, n), origins (B, n, 3)."""

    pairs: list[Tensor]
    mask: Tensor | None
    origins: Tensor


def roll(
    past: XLMemories, pairs: Sequence[Tensor], origins: Tensor, survives: Tensor | None, capacity: int
) -> tuple[XLMemories, Discarded]:
    """Append the surviving pairs of a segment (B, G, T, 2, D) to those of the past; keep the last `capacity` of a row.

    The state of the convolutions is not touched.
    """
    order = mask = None
    if past.mask is not None or survives is not None:
        batch, length = origins.shape[:2]
        ones = origins.new_ones(batch, past.length + length, dtype=torch.bool)
        held = ones[:, : past.length] if past.mask is None else past.mask
        mask = torch.cat((held, ones[:, past.length :] if survives is None else survives), dim=1)
        order = right_aligning(mask)
        mask = torch.take_along_dim(mask, order, dim=1)
    joined = [
        reorder(torch.cat((old.to(new), new.detach()), dim=2), order, 2) for old, new in zip(past, pairs, strict=True)
    ]
    origins = reorder(torch.cat((past.origins, origins), dim=1), order, 1)
    kept = min(capacity, origins.shape[1])
    cut = origins.shape[1] - kept
    kept_mask, lost_mask = (None, None) if mask is None else (mask[:, cut:], mask[:, :cut])
    state = XLMemories(
        [x[:, :, cut:] for x in joined],
        origins=origins[:, cut:],
        mask=None if kept_mask is None or bool(kept_mask.all()) else kept_mask,
        conv_states=past.conv_states,
    )
    return state, Discarded([x[:, :, :cut] for x in joined], lost_mask, origins[:, :cut])


def roll_convolution(state: Tensor, inputs: Tensor, survives: Tensor | None) -> Tensor:
    """The last W - 1 inputs of a convolution: state (B, W - 1, C), inputs (B, T, C) -> (B, W - 1, C), 0 where none."""
    joined = torch.cat((state.to(inputs), inputs.detach()), dim=1)
    if survives is not None:
        mask = torch.cat((survives.new_ones(state.shape[:2]), survives), dim=1)
        joined = reorder(joined * mask.unsqueeze(-1), right_aligning(mask), 1)
    return joined[:, joined.shape[1] - state.shape[1] :]
