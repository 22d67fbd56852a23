"""Memories of spans on tiny random models, and what such a model gives by hand."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache

from memorizing_transformers_pytorch.huggingface import attach_memory, attach_spans
from memorizing_transformers_pytorch.huggingface.finder import Head
from memorizing_transformers_pytorch.huggingface.probe import Layer

NOTHING_ELSE: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}  # for `generate`


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 99, (rows, count), generator=torch.Generator().manual_seed(seed))


def last_head(_model: Any, served: dict[int, Layer]) -> Head:
    """Random models have no induction head: the last one of the last layer finds passages."""
    index = max(served)
    return Head(index, served[index].heads - 1, 1.0)


def attached(model: Any, **options: Any) -> Any:
    """Two passages of 12 tokens and 2 of the beginning: 26 positions, unless `options` say otherwise."""
    small = {"passages": 2, "span": 12, "first": 2, "every": 4, "chunk": 64, "overlap": 0, "max_memories": 4_096}
    with mock.patch.object(attach_spans, "best_head", last_head):
        return attach_memory(model, retrieve="spans", **small | options)


def read(memory: Any, *texts: Tensor) -> Any:
    """The memory, with these documents (rows, N) one after the other."""
    for text in texts:
        memory.read(text, progress=False)
    return memory


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **options).logits
    return found


def recalled(memory: Any, row: int = 0) -> Tensor:
    """Origins (P, 3) of what stood before a row of the last call: document, place in the row of the memory, token."""
    origins: Tensor = memory._at_work.last_recalled[row].origins
    return origins


@torch.no_grad()
def logits_by_hand(memory: Any, texts: list[Tensor], ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the bare model gives for one prompt (1, T) after what was recalled for it, from the keys and values that it
    makes of each whole document, moved to where they stand."""
    origins = recalled(memory)
    starts, documents = [0, *torch.tensor([len(text) for text in texts]).cumsum(0).tolist()], origins[:, 0].tolist()
    held = []
    for text in texts:
        held.append(DynamicCache())
        plain(memory, text[None], past_key_values=held[-1])
    cache, layers = DynamicCache(), memory._recall.search.layers
    for i, layer in enumerate(layers.values()):
        pairs = []
        for place, (number, at) in enumerate(zip(documents, origins[:, 1].tolist(), strict=True)):
            source, at = held[number].layers[i], at - starts[number]
            key, value = source.keys[:, :, at : at + 1], source.values[:, :, at : at + 1]
            if layer.rotary is not None:
                key = layer.rotary.turned(key, torch.tensor([[place - at]])).to(key.dtype)
            pairs.append((key, value))
        cache.update(*(torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True)), i)
    return plain(memory, ids, past_key_values=cache)


def plain(memory: Any, ids: Tensor, **options: Any) -> Tensor:
    with memory.enabled(False):
        return logits(memory.model, ids, **options)


def close(found: Tensor, expected: Tensor, limit: float = 1e-5) -> bool:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max()) < limit
