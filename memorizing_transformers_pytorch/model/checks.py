"""Whether what is passed to a model fits it; if not, ValueError that names what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList
from memorizing_transformers_pytorch.memory.entries import as_int64
from memorizing_transformers_pytorch.model.config import IGNORE_INDEX, ModelConfig
from memorizing_transformers_pytorch.model.segment import XLMemories


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


def check_state(config: ModelConfig, state: Sequence[Tensor] | None, initial: XLMemories) -> XLMemories:
    """XL memory and convolution states as a call of this model returned them; `initial` shows what they look like."""
    if state is None:
        return initial
    if not isinstance(state, XLMemories):
        raise ValueError(f"expected xl_memories as the preceding call returned them, got {type(state).__name__}")
    got = (len(state), len(state.conv_states))
    expected = (len(initial), len(initial.conv_states))
    if got != expected:
        raise ValueError(f"expected xl_memories of (XL layers, convolutions) {expected}, got {got}")
    if state.length > config.num_kv_pairs_kept:
        raise ValueError(f"expected at most {config.num_kv_pairs_kept} pairs in xl_memories, got {state.length}")
    check_devices(initial.origins.device, xl_memories=state.origins)
    batch = initial.origins.shape[0]
    if state.origins.shape[0] != batch:
        raise ValueError(f"expected xl_memories of {batch} rows, got {state.origins.shape[0]}")
    if state.mask is not None and (state.mask.dtype != torch.bool or state.mask.shape != state.origins.shape[:2]):
        got_mask = f"{state.mask.dtype} {tuple(state.mask.shape)}"
        raise ValueError(f"expected a bool mask {tuple(state.origins.shape[:2])} in xl_memories, got {got_mask}")
    for pairs, template in zip(state, initial, strict=True):
        shape = (*template.shape[:2], state.length, *template.shape[3:])
        if pairs.shape != shape:
            raise ValueError(f"expected pairs {shape} in xl_memories, got {tuple(pairs.shape)}")
    for conv_state, template in zip(state.conv_states, initial.conv_states, strict=True):
        if conv_state.shape != template.shape:
            raise ValueError(f"expected a state {tuple(template.shape)}, got {tuple(conv_state.shape)}")
    return state
