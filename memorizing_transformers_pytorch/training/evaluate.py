"""Loss on held-out documents with the memory on and off, and with memories that should be of no use.

Each document is read once, in order, a document per row. At every segment the same weights and the same kind of local
context are scored in each of these modes; then the segment is stored.

off       no memory
other     the memory of another document (that of the next row): is it the right text that helps, or any?
shuffled  the document's own memory with its values permuted: are keys and values used together?
on        the document's own memory

Shapes: B rows (documents), T tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList
from memorizing_transformers_pytorch.model import MemorizingTransformer
from memorizing_transformers_pytorch.segment import XLMemories

CONTROLS = ("other", "shuffled")


@torch.no_grad()
def evaluate(
    model: MemorizingTransformer,
    documents: Sequence[np.ndarray],
    *,
    segment_length: int,
    max_tokens: int,
    controls: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Losses in nats for each mode: (documents, max_tokens), of the tokens that follow the first of each document.

    Documents must be longer than max_tokens, so that each row has as much to remember as the others. Raises ValueError
    for shorter ones, or for controls with a single document.
    """
    if not documents or min(len(document) for document in documents) <= max_tokens:
        raise ValueError(f"expected documents of more than {max_tokens} tokens, got {[len(d) for d in documents]}")
    if controls and len(documents) < 2:
        raise ValueError("expected at least 2 documents for the memory of another one, got 1")
    tokens = torch.from_numpy(np.stack([document[: max_tokens + 1] for document in documents]).astype(np.int64))
    tokens = tokens.to(model.device)
    modes = ("off", *(CONTROLS if controls else ()), "on")
    states: dict[str, XLMemories | None] = dict.fromkeys(modes)
    losses: dict[str, list[Tensor]] = {mode: [] for mode in modes}
    generator = torch.Generator().manual_seed(seed)
    with model.evaluating(), model.knn_memories_context(batch_size=len(documents)) as memories:
        for start in range(0, max_tokens, segment_length):
            stop = min(start + segment_length, max_tokens)
            for mode in modes:
                with _memory_of(mode, memories, generator) as memory:
                    loss, states[mode] = _score(model, tokens[:, start : stop + 1], memory, states[mode], mode == "on")
                losses[mode].append(loss)
    return {mode: torch.cat(parts, dim=1).cpu() for mode, parts in losses.items()}


def _score(
    model: MemorizingTransformer, tokens: Tensor, memory: KNNMemoryList | None, state: XLMemories | None, add: bool
) -> tuple[Tensor, XLMemories | None]:
    """tokens (B, T + 1) -> the loss of each but the first (B, T), and the state after the segment."""
    mask = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    result = model(tokens[:, :-1], memory, state, add_knn_memory=add, mask=mask)
    logits, state = result if model.carries_state else (result, None)
    return F.cross_entropy(logits.float().mT, tokens[:, 1:], reduction="none"), state


@contextmanager
def _memory_of(mode: str, memories: KNNMemoryList, generator: torch.Generator) -> Iterator[KNNMemoryList | None]:
    with ExitStack() as stack:
        if mode == "other":
            rows = len(memories[0].scoped_indices) if memories else 0
            stack.enter_context(memories.at_batch_indices([(row + 1) % rows for row in range(rows)]))
        elif mode == "shuffled":
            for memory in memories:
                stack.enter_context(shuffled_values(memory, generator))
        yield None if mode == "off" else memories


@contextmanager
def shuffled_values(memory: KNNMemory, generator: torch.Generator) -> Iterator[None]:
    """Inside, the values of each row of the memory are permuted among its entries; only for reading.

    Raises RuntimeError if a backward pass may still need them.
    """
    if memory.store.readers:
        raise RuntimeError("the values of this memory may still be needed by a backward pass: shuffle them later")
    values, filled = memory.store.values, memory.store.filled
    kept = [values[row, :, :count].clone() for row, count in enumerate(filled)]
    try:
        for row, count in enumerate(filled):
            values[row, :, :count] = kept[row][:, torch.randperm(count, generator=generator)]
        yield
    finally:
        for row, count in enumerate(filled):
            values[row, :, :count] = kept[row]
