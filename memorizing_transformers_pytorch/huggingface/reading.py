"""Reading texts into a memory, a piece at a time: what a piece brings is stored after its forward pass.

Shapes: R rows of the memory, B rows in a batch, N tokens of a text, T tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from memorizing_transformers_pytorch.huggingface.calls import Call
from memorizing_transformers_pytorch.huggingface.contents import Contents, Passed, origins_of
from memorizing_transformers_pytorch.huggingface.layer import Entries, Options
from memorizing_transformers_pytorch.huggingface.models import check_ids, evaluating, run
from memorizing_transformers_pytorch.memory.entries import as_int64
from memorizing_transformers_pytorch.memory.ledger import Document

Pair = tuple[Tensor, Tensor]


class Piece(NamedTuple):
    """Tokens start ... stop - 1 of the text in a row, of which the last `new` were in no piece before."""

    row: int
    start: int
    stop: int
    new: int


class SideBySide:
    """Texts that are read side by side, one for each row, and what has become of them in the memory.

    titles: of new documents, one for each text. goes_on: the document to continue instead; part of it was read already.
    starts: the position of the first token of each text in its row.
    """

    def __init__(self, contents: Contents, titles: list[str | None], goes_on: Document | None) -> None:
        self._contents, self._begun = contents, {} if goes_on else dict(enumerate(titles))
        first = contents.ledger.next_number
        self._numbers = [goes_on.number] if goes_on else [first + row for row in range(len(titles))]
        self._known = goes_on.tokens if goes_on else 0
        _, read = contents.places_of(len(titles))
        self.starts = [place - self._known for place in read]

    def pieces(self, texts: list[Tensor], size: int, overlap: int, *, progress: bool) -> Iterator[list[Piece]]:
        """As `pieces_of`, of what is not known of the texts."""
        lengths = [len(text) for text in texts]
        with tqdm(total=sum(lengths) - self._known, unit=" tokens", disable=not progress) as bar:
            for pieces in pieces_of(lengths, size, overlap, self._known):
                yield pieces
                bar.update(sum(piece.new for piece in pieces))

    def rows_of(self, pieces: list[Piece]) -> list[int]:
        """Which rows of the memory these read."""
        rows, _ = self._contents.places_of(len(self.starts))
        return [piece.row if len(rows) == len(self.starts) else rows[0] for piece in pieces]

    def store(self, pieces: list[Piece], tokens: Tensor, mask: Tensor, skipped: int, kept: Mapping[int, Pair]) -> None:
        """Store pieces (B, T), but for the first `skipped` tokens and those that were read before. kept: keys and
        values (B, G, T, D) by layer."""
        mask = mask.bool()
        mask[:, : max(skipped, self._known - pieces[0].start)] = False
        starts = torch.tensor([self.starts[piece.row] + piece.start for piece in pieces])
        places = (starts[:, None] + torch.arange(tokens.shape[1])).expand_as(tokens)
        origins = origins_of([self._numbers[piece.row] for piece in pieces], places, tokens)
        passed = Passed(
            [piece.row for piece in pieces],
            {index: Entries(*pair, mask, origins) for index, pair in kept.items()},
            {self._numbers[piece.row]: min(piece.new, piece.stop - self._known) for piece in pieces},
            {piece.row: self.starts[piece.row] + piece.stop for piece in pieces},
            self._begun,
        )
        self._contents.store(len(self.starts), passed)
        self._begun = {}


class Reader:
    """Reads texts, one for each row, in evaluation mode and without learning.

    store: whether what is read is stored. look_up: whether pieces see what is remembered.
    """

    def __init__(self, model: Any, options: Options, documents: SideBySide, *, store: bool, look_up: bool) -> None:
        self._model, self._options, self._documents = model, options, documents
        self._store, self._look_up = store, look_up
        self._pieces: list[Piece] = []
        self._call: Call | None = None

    def read_all(self, texts: list[Tensor], *, losses: bool, progress: bool) -> list[Tensor]:
        """Read what is not known of the texts -> if wanted, the loss of each of their tokens, NaN where there is none.

        What was read before an error stays.
        """
        found, options = no_losses(texts), self._options
        with torch.inference_mode(False), evaluating(self._model):
            for pieces in self._documents.pieces(texts, options.chunk, options.skip_first, progress=progress):
                self._pieces, (tokens, mask) = pieces, padded(texts, pieces)
                out = run(self._model, tokens, attention_mask=mask, logits_to_keep=0 if losses else 1)
                if losses:
                    fill_in(found, pieces, tokens, out.logits)
                if self._store and self._call is not None:
                    self._documents.store(pieces, tokens, mask, options.skip_first, self._call.pairs)
        return found

    def before(self, call: Call) -> None:
        """Have the call read the pieces of now."""
        call.rows = self._documents.rows_of(self._pieces)
        call.offsets = [self._documents.starts[piece.row] + piece.start for piece in self._pieces]
        call.enabled, call.keeps_pairs = call.enabled and self._look_up, self._store
        self._call = call

    def after(self, call: Call, failed: bool) -> None:
        """What the call has brought is stored by `read_all`."""


def padded(texts: list[Tensor], pieces: list[Piece]) -> tuple[Tensor, Tensor]:
    """The tokens (B, T) of pieces of texts, padded on the right with 0, and where they are: 1."""
    parts = [texts[piece.row][piece.start : piece.stop] for piece in pieces]
    tokens = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(part) for part in parts])
    return tokens, (torch.arange(tokens.shape[1]) < lengths[:, None]).long()


def no_losses(texts: list[Tensor]) -> list[Tensor]:
    """To be filled in."""
    return [torch.full((len(text),), torch.nan) for text in texts]


def fill_in(
    losses: list[Tensor],
    pieces: list[Piece],
    tokens: Tensor,
    logits: Tensor,
    start: int = 0,
    before: Tensor | None = None,
) -> Tensor:
    """The losses of those tokens from `start` on that were in no piece before, by logits (B, T, V), and those of the
    token before (B, 1, V), if any -> the last ones."""
    stop = start + logits.shape[1]
    known = logits[:, :-1] if before is None else torch.cat((before, logits[:, :-1]), dim=1)
    begin = stop - known.shape[1]
    for piece, own, predicted in zip(pieces, tokens, known, strict=True):
        size = piece.stop - piece.start
        first, end = max(size - piece.new, begin), min(stop, size)
        if first < end:
            some = predicted[first - begin : end - begin].float()
            each = F.cross_entropy(some, own[first:end].to(some.device), reduction="none")
            losses[piece.row][piece.start + first : piece.start + end] = each.cpu()
    return logits[:, -1:]


def checked_texts(input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int) -> list[Tensor]:
    """input_ids (N,) or (R, N) and their mask -> the tokens of each row. Raises ValueError for what cannot be read."""
    input_ids = as_int64(input_ids, "input_ids")
    if input_ids.ndim not in (1, 2):
        raise ValueError(f"expected input_ids (N,) or (rows, N), got {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise ValueError(
            f"expected at least one token in each document, got input_ids of shape {tuple(input_ids.shape)}"
        )
    if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:
        given = str(tuple(attention_mask.shape)) if isinstance(attention_mask, Tensor) else repr(type(attention_mask))
        raise ValueError(f"expected an attention_mask of shape {tuple(input_ids.shape)}, got {given}")
    rows = input_ids.cpu().reshape(-1, input_ids.shape[-1])
    mask = torch.ones_like(rows) if attention_mask is None else attention_mask.cpu().reshape(rows.shape)
    texts = [row[kept] for row, kept in zip(rows, mask.bool(), strict=True)]
    for row, text in enumerate(texts):
        if len(text) == 0:
            raise ValueError(f"expected at least one token in each document, got none in row {row}")
        check_ids(text, vocabulary, f"row {row}")
    return texts


def stops_of(length: int, size: int, overlap: int, pieces: int) -> list[int]:
    """Where to stop reading a text of this length for a while, every so many pieces; the last is its end."""
    step = pieces * (size - overlap)
    return [*range(step + overlap, length, step), length]


def pieces_of(lengths: list[int], size: int, overlap: int, read: int = 0) -> Iterator[list[Piece]]:
    """The texts of these lengths side by side, so many tokens at a time, each piece beginning with the last ones of the
    piece before; texts that have ended are left out, and pieces of which all was read."""
    for start in range(0, max(lengths), size - overlap):
        known = overlap if start else 0  # tokens that the piece before had
        pieces = [
            Piece(row, start, min(start + size, length), min(start + size, length) - start - known)
            for row, length in enumerate(lengths)
            if start + known < length
        ]
        if pieces and start + size > read:
            yield pieces
