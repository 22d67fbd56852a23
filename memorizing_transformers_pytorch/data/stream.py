"""Documents to segments: each row follows one document to its end, then takes the next; rows never mix.

Shapes: B rows, T tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memorizing_transformers_pytorch.config import IGNORE_INDEX


class Batch(NamedTuple):
    """One segment of each row.

    tokens, labels: (B, T) int64; the label is the next token of the document, -100 for its last token and padding.
    mask: (B, T) bool, False for padding. origins: (B, T, 3): document, position, token.
    starts: rows in which a document begins, whose memory and state must be cleared before this segment.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    origins: Tensor
    starts: list[int]

    def to(self, device: torch.device) -> Batch:
        tensors = [tensor.to(device) for tensor in (self.tokens, self.labels, self.mask, self.origins)]
        return Batch(tensors[0], tensors[1], tensors[2], tensors[3], self.starts)


class DocumentStream(Iterator[Batch]):
    """An endless stream of batches over documents, in a new order each time all have been handed out.

    documents: token ids of each. The segment that ends a document is padded. Raises ValueError for sizes below 1 or
    no document of at least two tokens.
    """

    def __init__(self, documents: Sequence[np.ndarray], *, rows: int, segment_length: int, seed: int = 0) -> None:
        if rows < 1 or segment_length < 1:
            raise ValueError(f"expected rows and segment_length of at least 1, got {rows} and {segment_length}")
        self._documents = documents
        self._usable = [number for number, document in enumerate(documents) if len(document) > 1]
        if not self._usable:
            raise ValueError(f"expected a document of at least 2 tokens, got {len(documents)} shorter ones")
        self._segment_length = segment_length
        self._seed = seed
        self._epoch = 0
        self._taken = 0  # documents handed out in this epoch
        self._places = [[-1, 0] for _ in range(rows)]  # document and position of each row; -1 before its first

    @property
    def rows(self) -> int:
        return len(self._places)

    def __next__(self) -> Batch:
        rows, length = self.rows, self._segment_length
        tokens = np.zeros((rows, length), dtype=np.int64)
        labels = np.full((rows, length), IGNORE_INDEX, dtype=np.int64)
        origins = np.zeros((rows, length, 3), dtype=np.int64)
        mask = np.zeros((rows, length), dtype=bool)
        starts = []
        for row, place in enumerate(self._places):
            if place[0] < 0 or place[1] >= len(self._documents[place[0]]):
                place[:] = [self._next_document(), 0]
                starts.append(row)
            number, position = place
            text = self._documents[number][position : position + length + 1].astype(np.int64)
            count = min(len(text), length)
            tokens[row, :count], labels[row, : len(text) - 1] = text[:count], text[1:]
            origins[row, :count] = np.stack(
                (np.full(count, number), position + np.arange(count), text[:count]), axis=-1
            )
            mask[row, :count] = True
            place[1] = position + count
        numbers = [torch.from_numpy(array) for array in (tokens, labels, mask, origins)]
        return Batch(numbers[0], numbers[1], numbers[2], numbers[3], starts)

    def _next_document(self) -> int:
        if self._taken == len(self._usable):
            self._epoch, self._taken = self._epoch + 1, 0
        order = np.random.default_rng((self._seed, self._epoch)).permutation(len(self._usable))
        self._taken += 1
        return self._usable[int(order[self._taken - 1])]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, for JSON."""
        return {"epoch": self._epoch, "taken": self._taken, "places": [list(place) for place in self._places]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken. Raises ValueError for another number of rows."""
        if len(state["places"]) != len(self._places):
            raise ValueError(f"expected the state of {len(self._places)} rows, got {len(state['places'])}")
        self._epoch, self._taken = state["epoch"], state["taken"]
        self._places = [list(place) for place in state["places"]]
