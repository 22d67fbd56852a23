"""Loss on held-out documents, read whole and in order, by the size of the memory; and with memories of no use.

Several documents of about the same length are read side by side. Each segment is scored in every mode, with the same
weights and the same kind of local context and XL memory: the modes differ in the memory alone, and carry a state each.

off    no memory
512    a memory of its own document with 512 entries (or any other size), which then stores the segment
other, shuffled, random keys    that of the size `controls_at`, but useless; see `controls`

Shapes: B rows (documents), T tokens of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from memorizing_transformers_pytorch.evaluation.controls import CONTROLS, control
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.model.state import XLMemories
from memorizing_transformers_pytorch.utils.progress import bar as progress_bar

Losses = dict[str, list[np.ndarray]]
"""For each mode and document the losses (n - 1,) float32, in nats, of the tokens that follow the first of its n."""


def mode_of(memory_size: int) -> str:
    """The name of the mode with this memory size."""
    return str(memory_size) if memory_size else "off"


def mean_loss(losses: Sequence[np.ndarray]) -> float:
    """The mean over all tokens of all documents, in nats."""
    return float(np.concatenate(losses).mean(dtype=np.float64))


@dataclass(frozen=True)
class _Modes:
    """sizes: of the memories; the one of size `controls_at` is read by the controls too."""

    sizes: tuple[int, ...]
    controls_at: int | None
    controls: tuple[str, ...]

    def of(self, size: int) -> list[tuple[str, str | None]]:
        """The modes that read the memory of this size, the last of which stores, and the control of each."""
        return [(name, name) for name in self.controls if size == self.controls_at] + [(mode_of(size), None)]

    @property
    def names(self) -> list[str]:
        return [*map(mode_of, self.sizes), *(self.controls if self.controls_at is not None else ())]

    def within(self, num_tokens: int) -> _Modes:
        """The same for documents of this length: memories that can hold all of it are all alike."""
        sizes = tuple(dict.fromkeys(min(size, num_tokens) for size in self.sizes))
        controls_at = None if self.controls_at is None else min(self.controls_at, num_tokens)
        return _Modes(sizes, controls_at, self.controls)


@torch.no_grad()
def evaluate(
    model: MemorizingTransformer,
    documents: Sequence[np.ndarray],
    *,
    segment_length: int,
    memory_sizes: Sequence[int],
    controls_at: int | None = None,
    controls: Sequence[str] = CONTROLS,
    rows: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Losses:
    """The losses of each document in each mode: those of `memory_sizes` (0 is "off"), and the controls if asked for.

    documents: token ids (n,) of each, of any lengths; those of less than 2 tokens have no losses.
    segment_length: local context; take that of training.
    controls_at: the memory size, among `memory_sizes`, at which the controls are read; None for no controls.
    rows: documents read side by side (at least 2, and so up to 3 for rows=2, for the memory of another one).
    max_tokens: score no more than the first ones of each document.
    seed: of shuffling and random keys. No other random numbers are drawn, and the model is left as it was.

    Raises ValueError, before anything is read, for bad sizes, no document of 2 tokens, or a control for
    which there are too few documents.
    """
    modes = _Modes(tuple(memory_sizes), controls_at, tuple(controls))
    texts = [document if max_tokens is None else document[: max_tokens + 1] for document in documents]
    _check(model, modes, segment_length, rows, max_tokens)
    batches = _batches([len(text) for text in texts], rows, at_least=2 if "other" in modes.names else 1)
    losses: Losses = {name: [np.zeros(max(len(text) - 1, 0), np.float32) for text in texts] for name in modes.names}
    generator = torch.Generator().manual_seed(seed)
    total = sum(len(text) - 1 for text in texts if len(text) > 1)
    with (
        model.evaluating(),
        progress_bar(total=total, unit=" tokens", unit_scale=True, disable=not progress) as bar,
    ):
        for batch in batches:
            read = _read_side_by_side(model, [texts[n] for n in batch], modes, segment_length, generator, bar)
            for name, rows_read in read.items():
                for number, of_row in zip(batch, rows_read, strict=True):
                    losses[name][number][:] = of_row
    return losses


def _check(model: MemorizingTransformer, modes: _Modes, segment_length: int, rows: int, max_tokens: int | None) -> None:
    for name, size in (("segment_length", segment_length), ("rows", rows), ("max_tokens", max_tokens)):
        if size is not None and size < 1:
            raise ValueError(f"expected {name} to be at least 1, got {size}")
    if not modes.sizes or len(set(modes.sizes)) != len(modes.sizes) or min(modes.sizes) < 0:
        raise ValueError(f"expected distinct memory sizes of at least 0, got {list(modes.sizes)}")
    if max(modes.sizes) > 0 and not model.config.layers_with_memory:
        raise ValueError(f"expected only memory size 0 for a model without memory, got {list(modes.sizes)}")
    if modes.controls_at is not None and (modes.controls_at < 1 or modes.controls_at not in modes.sizes):
        raise ValueError(f"expected controls_at among memory sizes {list(modes.sizes)}, got {modes.controls_at}")
    if not set(modes.controls) <= set(CONTROLS):
        raise ValueError(f"expected controls among {CONTROLS}, got {modes.controls}")


def _batches(lengths: Sequence[int], rows: int, at_least: int) -> list[list[int]]:
    """Numbers of documents to read side by side, the longest first; in batches of `at_least` or more."""
    order = sorted((n for n, length in enumerate(lengths) if length > 1), key=lambda n: -lengths[n])
    if not order:
        raise ValueError(f"expected documents of at least 2 tokens, got {len(lengths)} shorter ones")
    if len(order) < at_least:
        raise ValueError(f"expected at least {at_least} documents for the memory of another one, got {len(order)}")
    count = min(math.ceil(len(order) / rows), len(order) // at_least)
    return [part.tolist() for part in np.array_split(np.array(order), count)]


class _Segment(NamedTuple):
    """Of the rows that still have something to score: tokens, labels (B, T) int64 and mask (B, T) bool, on a device."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    counts: list[int]


def _segment(texts: Sequence[np.ndarray], start: int, length: int, device: torch.device) -> _Segment:
    """The tokens from `start` that have a successor to predict, of the texts (longest first) that have any."""
    pieces = [torch.from_numpy(text[start : start + length + 1].astype(np.int64)) for text in texts]
    pieces = [piece for piece in pieces if len(piece) > 1]
    tokens = torch.nn.utils.rnn.pad_sequence([piece[:-1] for piece in pieces], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([piece[1:] for piece in pieces], batch_first=True)
    counts = [len(piece) - 1 for piece in pieces]
    mask = torch.arange(tokens.shape[1]) < torch.tensor(counts)[:, None]
    return _Segment(tokens.to(device), labels.to(device), mask.to(device), counts)


def _read_side_by_side(
    model: MemorizingTransformer,
    texts: Sequence[np.ndarray],
    modes: _Modes,
    segment_length: int,
    generator: torch.Generator,
    bar: tqdm[Any],
) -> Losses:
    """Read texts, the longest first, from beginning to end; a row whose text has ended takes no further part."""
    needed = modes.within(len(texts[0]))
    parts: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in texts] for name in needed.names}
    states: dict[str, XLMemories | None] = dict.fromkeys(needed.names)
    with ExitStack() as stack:
        memories = {
            size: stack.enter_context(model.knn_memories_context(batch_size=len(texts), max_memories=size))
            for size in needed.sizes
            if size > 0
        }
        for start in range(0, len(texts[0]) - 1, segment_length):
            segment = _segment(texts, start, segment_length, model.device)
            for size in needed.sizes:
                for name, useless in needed.of(size):
                    loss, states[name] = _score(model, segment, memories.get(size), useless, states[name], generator)
                    for row, count in enumerate(segment.counts):
                        parts[name][row].append(loss[row, :count])
            bar.update(sum(segment.counts))
    joined = {name: [np.concatenate(of_row) for of_row in rows] for name, rows in parts.items()}
    alike = {mode_of(size): mode_of(min(size, len(texts[0]))) for size in modes.sizes}
    return {name: joined[alike.get(name, name)] for name in modes.names}


def _score(
    model: MemorizingTransformer,
    segment: _Segment,
    memories: KNNMemoryList | None,
    useless: str | None,
    state: XLMemories | None,
    generator: torch.Generator,
) -> tuple[np.ndarray, XLMemories | None]:
    """The loss of each label (B, T) and the state after the segment, which the right memory then holds."""
    rows = range(len(segment.tokens))
    if state is not None:
        state = state.taken(torch.tensor(rows, device=model.device))
    with ExitStack() as stack:
        if memories is not None:
            stack.enter_context(memories.at_batch_indices(rows))
            stack.enter_context(control(useless, memories, generator))
        result = model(segment.tokens, memories, state, add_knn_memory=useless is None, mask=segment.mask)
    logits, state = result if model.carries_state else (result, None)
    return F.cross_entropy(logits.float().mT, segment.labels, reduction="none").cpu().numpy(), state
