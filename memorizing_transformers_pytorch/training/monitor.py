"""What the memory does in training, measured with forward hooks; the model does not know about it.

mass: the share of the attention that falls on retrieved entries, for each head (the mean over tokens that found some).
age: how many tokens of the document lie between a token and the entries that it found, as quantiles.
recall: the share of the truly best entries that the index found, by comparison with all of them for a few queries.
temperature, gate: the learned numbers of each head.

Shapes: B rows, H query heads, G key/value heads, T queries, K retrieved, D head width, N entries of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.attention.attention import Attended, Reading
from memorizing_transformers_pytorch.attention.knn_attention import KNNAttention
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.index.exact import recall_of
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.model.segment import shifted

SAMPLED_QUERIES = 16  # of each row and head, for recall and age

Seen = dict[str, Any]


@contextmanager
def watching(model: MemorizingTransformer, memories: Sequence[KNNMemory]) -> Iterator[dict[str, Seen]]:
    """Inside, the last forward pass of each memorizing layer is measured, under "layer N"."""
    seen: dict[str, Seen] = {}
    noted: set[int] = set()  # leases
    read = shifted(memories, model.config.shift_knn_memories_down)
    with ExitStack() as hooks:
        for number, memory in zip(model.config.layers_with_memory, read, strict=True):
            block: nn.Module = model.layers[number - 1][0]  # type: ignore[index]
            handle = block.register_forward_hook(partial(_note, seen, noted, f"layer {number}", memory))
            hooks.callback(handle.remove)
        yield seen


@torch.no_grad()
def _note(
    seen: dict[str, Seen],
    noted: set[int],
    name: str,
    memory: KNNMemory,
    block: nn.Module,
    _: Any,
    attended: Attended,
) -> None:
    attention, reading = block.fn, attended.reading
    if reading is not None and int(reading.lookup.lease) in noted:
        return  # gradient checkpointing runs the layer again, when the memory has changed
    assert isinstance(attention, KNNAttention)
    seen[name] = {"temperature": _rounded(attention.scale.exp())}
    if attention.gate is not None:
        seen[name]["gate"] = _rounded(attention.gate.sigmoid())
    if reading is None or not bool(reading.lookup.mask.any()):
        return
    noted.add(int(reading.lookup.lease))
    seen[name]["mass"] = _rounded(attention_mass(reading))
    seen[name]["recall"] = round(recall(reading, memory, SAMPLED_QUERIES), 4)
    ages = ages_of(reading, memory, SAMPLED_QUERIES)
    if ages.numel() > 0:
        quantiles = torch.tensor([0.1, 0.5, 0.9], device=ages.device)
        seen[name]["age"] = [round(age) for age in ages.float().quantile(quantiles).tolist()]


def _rounded(numbers: Tensor) -> list[float]:
    return [round(number, 4) for number in numbers.flatten().tolist()]


def attention_mass(reading: Reading) -> Tensor:
    """The share of the attention on retrieved entries (H,), over the tokens that found any."""
    found = reading.lookup.mask.any(dim=-1)
    mass = reading.weights.float().sum(dim=-1) * found
    return mass.sum(dim=(0, 2)) / found.sum(dim=(0, 2)).clamp_min(1)


def _sampled(tensor: Tensor, count: int) -> Tensor:
    """Some queries, evenly spread: (B, H, T, n) -> (B, H, at most count, n)."""
    step = max(tensor.shape[2] // count, 1)
    return tensor[:, :, ::step][:, :, :count]


def ages_of(reading: Reading, memory: KNNMemory, count: int) -> Tensor:
    """(n,) tokens from retrieved entries to the end of what the row remembers, where positions are known.

    The newest entry of a row is the token before the segment, so ages count from there.
    """
    mask = _sampled(reading.lookup.mask, count)
    positions = memory.origins(_sampled(reading.lookup.slots, count)).to(mask.device)[..., 1]
    store = memory.store
    newest = [
        store.origins[row, : store.filled[row], 1].amax() if store.filled[row] else 0 for row in memory.scoped_indices
    ]
    ages = positions.new_tensor(newest).view(-1, 1, 1, 1) - positions
    return ages[mask & (positions >= 0)]


def recall(reading: Reading, memory: KNNMemory, count: int) -> float:
    """The share of the best entries that were found, for some of the queries, in the rows that found any."""
    mask = _sampled(reading.lookup.mask, count)
    scores = _sampled(reading.lookup.scores, count).masked_fill(~mask, -torch.inf)
    rows = mask.flatten(1).any(dim=1).nonzero().squeeze(1).tolist()
    rings = [memory.store.ring(memory.scoped_indices[i]) for i in rows]
    return recall_of(_sampled(reading.queries, count)[rows], scores[rows], rings)
