"""`explain` for a memory of passages: which stood before each part of a text, and what each is worth to it.

Shapes: N tokens of the text, T of a block, L layers, H heads, E passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memorizing_transformers_pytorch.explorer.explanation import Block, Explanation, Passage
from memorizing_transformers_pytorch.explorer.sources import Decode, Sources
from memorizing_transformers_pytorch.explorer.watching import COLUMNS, PassageModel, losses_of


def explain_passages(eye: PassageModel, ids: Tensor, decode: Decode | None, around: int) -> Explanation:
    """What `explain` tells, except for what passages are worth."""
    logits, blocks = eye.run(ids, attention=True)
    with eye.blind():
        alone = eye.run(ids)
    parts = [_Part(block, eye.first) for block in blocks]
    starts = {each.document: eye.start_of(each.document) for part in parts for each in part.passages}
    sources = Sources((), 0, decode)
    for each in (each for part in parts for each in part.passages):
        sources.add(each.document, starts[each.document] + each.position, each.tokens.tolist())
    columns = map(np.concatenate, zip(*(part.columns() for part in parts), strict=True))
    found = Explanation(
        texts=sources.pieces(ids.tolist()),
        losses=losses_of(logits, ids, eye.prompt),
        without_memory=losses_of(alone.logits, ids, eye.prompt),
        layers=blocks[0].layers,
        mass=np.concatenate([part.weights.sum(axis=-1) for part in parts], axis=-1),
        titles={each.number: each.title for each in eye.ledger.documents()},
        columns=dict(zip(COLUMNS, columns, strict=True)),
        passages=[],
        sources=sources,
        starts=starts,
        around=around,
    )
    joined = _joined(found, [each for part in parts for each in part.passages])
    told = [each for part in parts if (each := part.told(found, eye.prompt)) is not None]
    found = replace(found, passages=joined, blocks=told)
    return replace(found, passages=found.passages_by(1))


class _Part:
    """A block without the first tokens of a document, which come along, but only hold attention (attention sinks)."""

    def __init__(self, block: Any, first: int) -> None:
        kept = [i for i, each in enumerate(block.passages) if not _is_beginning(each, first)]
        self._block = block
        self.passages = [block.passages[i] for i in kept]
        self._places = np.array([block.places[i] for i in kept], dtype=np.int64)
        self.weights, self._peaks = block.weights[..., kept].numpy(), block.peaks[..., kept].numpy()
        for i, (place, each) in enumerate(zip(self._places, self.passages, strict=True)):
            self.weights[..., : max(place + len(each.tokens) - block.start, 0), i] = 0  # its own tokens are not asked

    def columns(self) -> list[np.ndarray]:
        """The table: a row for each token, layer, head and passage, with the attention on all of the passage, and the
        place and token of it that got most."""
        layer, head, token, which = (index.ravel() for index in np.indices(self.weights.shape))
        if not len(which):
            return [np.zeros(0, dtype=np.int64)] * len(COLUMNS)
        token, peak = token + self._block.start, self._peaks.ravel()
        score, document, position = (
            np.array([getattr(each, name) for each in self.passages])[which]
            for name in ("score", "document", "position")
        )
        source_token = pad_sequence([each.tokens for each in self.passages], batch_first=True).numpy()[which, peak]
        age = token - self._places[which] - peak
        layer = np.array(self._block.layers)[layer]
        return [token, layer, head, score, self.weights.ravel(), document, position + peak, source_token, age]

    def told(self, found: Explanation, prompt: int) -> Block | None:
        """Which tokens it has predicted after the prompt, and with which passages before them."""
        first = self._block.start + 1 if self._block.start else prompt
        last = min(self._block.stop, len(found.texts) - 1)
        heads = max(self.weights.shape[0] * self.weights.shape[1], 1)
        weights = (self.weights.sum(axis=(0, 1, 2)) / heads).tolist()
        own = [
            replace(_passage(found, each), weight=weight) for each, weight in zip(self.passages, weights, strict=True)
        ]
        return Block(first, last, own) if first <= last else None


def _is_beginning(each: Any, first: int) -> bool:
    return bool(each.score == 0 and each.position == 0 and len(each.tokens) <= first)


def _passage(found: Explanation, each: Any) -> Passage:
    first, last = each.position, each.position + len(each.tokens) - 1
    text = found.text(each.document, first, last)
    return Passage(each.document, found.title(each.document), first, last, text, 0.0, score=each.score)


def _joined(found: Explanation, excerpts: Sequence[Any]) -> list[Passage]:
    """The passages of all blocks, each place once: those that overlap are one."""
    joined: list[Passage] = []
    for each in sorted(excerpts, key=lambda each: (each.document, each.position)):
        own = _passage(found, each)
        before = joined[-1] if joined else None
        if before is not None and before.document == own.document and own.first <= before.last:
            last, score = max(before.last, own.last), max(before.score or 0.0, own.score or 0.0)
            text = found.text(own.document, before.first, last)
            joined[-1] = replace(before, last=last, text=text, score=score)
        else:
            joined.append(own)
    return sorted(joined, key=lambda each: -(each.score or 0.0))
