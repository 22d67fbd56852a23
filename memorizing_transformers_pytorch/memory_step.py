"""One segment's dealings with the memories: search them before, store in them after; all layers together or none.

Shapes: B rows, T tokens, G key/value heads, K retrieved, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from memorizing_transformers_pytorch.config import ModelConfig
from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList, Lookup
from memorizing_transformers_pytorch.nn.retrieval import LookUp
from memorizing_transformers_pytorch.segment import Boundaries, Segment, XLMemories, roll, roll_convolution

Item = TypeVar("Item")


class Written(NamedTuple):
    """What a segment leaves: the pairs of each layer (B, G, T, 2, D), the inputs of each convolution (B, T, C)."""

    pairs: list[Tensor]
    conv_inputs: list[Tensor]


def shifted(items: Sequence[Item], places: int) -> list[Item]:
    """What each place reads when the i-th reads from the (i + places)-th, wrapping round (Ding et al. 2021)."""
    return [items[(i + places) % len(items)] for i in range(len(items))]


def make_look_ups(
    config: ModelConfig, memories: KNNMemoryList | None, hidden_rows: Tensor | None
) -> list[LookUp | None]:
    """For each memorizing layer a search of the memory that it reads; hidden_rows (B,) bool find nothing."""
    if memories is None:
        return [None] * len(config.layers_with_memory)
    return [_search_once(memory, hidden_rows) for memory in shifted(memories, config.shift_knn_memories_down)]


def _search_once(memory: KNNMemory, hidden_rows: Tensor | None) -> LookUp:
    """A search that is done once: gradient checkpointing asks again after the memory has changed."""
    found: list[Lookup] = []

    def look_up(queries: Tensor, topk: int) -> Lookup:
        if not found:
            found.append(memory.look_up(queries, topk, hidden_rows))
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
    ended = _either(boundaries.starts, boundaries.ends)
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
        if ended is not None:
            memories.clear_memory(torch.tensor(memories[0].scoped_indices)[ended.cpu()].tolist())
        for memory, entries in zip(memories, staged, strict=True):
            memory.commit(entries)
    return new


def _either(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left | right
