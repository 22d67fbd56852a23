"""Documents to segments: each row follows one document to its end, then takes the next; rows never mix.

Shapes: B rows, T tokens of a segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memorizing_transformers_pytorch.data.cache import TokenisedDocuments
from memorizing_transformers_pytorch.model.config import IGNORE_INDEX


class Batch(NamedTuple):
    """One segment of each row.

    tokens, labels: (B, T) int64; the label is the next token of the document, -100 for its last token and padding.
    mask: (B, T) bool, False for padding. origins: (B, T, 3) int64: document, position, token.
    starts: (B, T) bool, True for the first token of a document, where memory and state of the row must be cleared.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    origins: Tensor
    starts: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class _Piece(NamedTuple):
    """Tokens of one document that lie in one row of a batch: where there, from where in the document, how many."""

    row: int
    column: int
    document: int
    position: int
    length: int


class DocumentStream(Iterator[Batch]):
    """An endless stream of batches over documents, in a new order each time all have been handed out.

    documents: token ids of each; those of fewer than 2 tokens are skipped. rows: of all processes together.
    pack: fill the segment that ends a document with the next of that row, instead of padding.
    only: the rows that this process hands out. Every process tracks the positions of all rows, which costs almost
    nothing: so each document goes to one process in each pass, and the state of one process is that of all.
    Raises ValueError for sizes below 1, more rows than documents, or rows that do not exist.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        *,
        rows: int,
        segment_length: int,
        seed: int = 0,
        pack: bool = False,
        only: range | None = None,
    ) -> None:
        if rows < 1 or segment_length < 1:
            raise ValueError(f"expected rows and segment_length of at least 1, got {rows} and {segment_length}")
        self._only = range(rows) if only is None else only
        if not self._only or min(self._only) < 0 or max(self._only) >= rows:
            raise ValueError(f"expected only to hold some of {rows} rows, got {self._only}")
        self._documents = documents
        if isinstance(documents, TokenisedDocuments):
            self._lengths = documents.lengths
        else:
            self._lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        self._usable = np.flatnonzero(self._lengths > 1)
        if rows > len(self._usable):
            most = f"{len(self._usable)} rows, one for each document of at least 2 tokens"
            raise ValueError(f"expected at most {most}, got {rows}")
        self._segment_length, self._seed, self._pack = segment_length, seed, pack
        self._taken = 0  # documents handed out in this epoch
        self._places = [[-1, 0] for _ in range(rows)]  # document and position of each row; -1 before its first
        self._begin_epoch(0)

    @property
    def rows(self) -> int:
        """How many rows this process hands out."""
        return len(self._only)

    def __next__(self) -> Batch:
        plan = [self._advance(row) for row in range(len(self._places))]
        return self._batch([piece for row in self._only for piece in plan[row]])

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, for JSON: the same in all processes."""
        return {
            "seed": self._seed,
            "documents": len(self._documents),
            "epoch": self._epoch,
            "taken": self._taken,
            "places": [list(place) for place in self._places],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken. Raises ValueError for a state of another stream."""
        ours = self.state_dict()
        if state.keys() != ours.keys():
            raise ValueError(f"expected a state of {', '.join(ours)}, got {', '.join(map(str, state)) or 'nothing'}")
        for name in ("seed", "documents"):
            if state[name] != ours[name]:
                raise ValueError(f"expected the state of a stream with {name} {ours[name]}, got {state[name]}")
        epoch, taken, places = state["epoch"], state["taken"], state["places"]
        if len(places) != len(self._places):
            raise ValueError(f"expected the state of {len(self._places)} rows, got {len(places)}")
        if not all(isinstance(number, int) for number in (epoch, taken, *itertools.chain(*places))) or epoch < 0:
            raise ValueError(f"expected an epoch, documents taken and places as whole numbers, got {state}")
        for number, position in places:
            if number >= 0 and not (number < len(self._lengths) and 0 <= position <= self._lengths[number]):
                raise ValueError(f"expected places within the documents, got position {position} of {number}")
        if not 0 <= taken <= len(self._usable):
            raise ValueError(f"expected at most {len(self._usable)} documents taken of epoch {epoch}, got {taken}")
        self._begin_epoch(epoch)
        self._taken, self._places = taken, [list(place) for place in places]

    def _advance(self, row: int) -> list[_Piece]:
        """What the row reads next, whether or not it is handed out here."""
        place = self._places[row]
        pieces: list[_Piece] = []
        column = 0
        while column < self._segment_length:
            if place[0] < 0 or place[1] >= self._lengths.item(place[0]):
                if pieces and not self._pack:
                    break
                place[:] = [self._next_document(), 0]
            count = min(self._segment_length - column, self._lengths.item(place[0]) - place[1])
            pieces.append(_Piece(row, column, place[0], place[1], count))
            place[1] += count
            column += count
        return pieces

    def _next_document(self) -> int:
        if self._taken == len(self._usable):
            self._begin_epoch(self._epoch + 1)
            self._taken = 0
        self._taken += 1
        return int(self._usable[self._order[self._taken - 1]])

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._usable))

    def _batch(self, pieces: list[_Piece]) -> Batch:
        shape = (self.rows, self._segment_length)
        tokens, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        mask, starts = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        origins = np.zeros((*shape, 3), dtype=np.int64)
        lines = {row: line for line, row in enumerate(self._only)}
        for row, column, document, position, length in pieces:
            line, end = lines[row], column + length
            text = self._documents[document][position : position + length + 1].astype(np.int64)
            tokens[line, column:end] = text[:length]
            labels[line, column : column + len(text) - 1] = text[1:]
            mask[line, column:end] = True
            starts[line, column] = position == 0
            origins[line, column:end, 0] = document
            origins[line, column:end, 1] = np.arange(position, position + length)
            origins[line, column:end, 2] = text[:length]
        return Batch(*map(torch.from_numpy, (tokens, labels, mask, origins, starts)))
