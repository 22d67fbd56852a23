"""Reading texts into the memories of a model, piece by piece: what a piece leaves is stored after its forward pass.

Shapes: R rows of the memory, B rows in a batch, T tokens of a piece.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from memorizing_transformers_pytorch.huggingface.contents import Contents, origins_of
from memorizing_transformers_pytorch.huggingface.devices import device_of
from memorizing_transformers_pytorch.huggingface.options import Options
from memorizing_transformers_pytorch.huggingface.probe import evaluating, run
from memorizing_transformers_pytorch.huggingface.texts import Piece, pieces_of


class Reader(AbstractContextManager["Reader"]):
    """Inside, the model is in evaluation mode and learns nothing. Afterwards rows stand after what was read of them.

    numbers: of the documents, one for each row. known: how many tokens of each were read before. store: whether what
    was read is remembered.
    """

    def __init__(
        self, model: Any, contents: Contents, options: Options, numbers: list[int], known: list[int], *, store: bool
    ) -> None:
        self._model, self._contents, self._options, self._store = model, contents, options, store
        self._numbers, self._known = numbers, known
        self._now = contents.reading.offsets.clone()
        self._before, self._first = self._now - torch.tensor(known), self._now.clone()
        self._evaluating = evaluating(model)

    def read_all(self, texts: list[Tensor], *, losses: bool, progress: bool) -> list[Tensor]:
        """Read what is not known of the texts -> if wanted, the loss of each of their tokens, NaN where there is none.

        What was read is in the ledger also when reading is broken off.
        """
        found = [torch.full((len(text),), torch.nan) for text in texts]
        lengths, options = [len(text) for text in texts], self._options
        pieces = pieces_of(lengths, options.chunk, options.skip_first, max(self._known))
        try:
            with self, tqdm(total=sum(lengths) - sum(self._known), unit=" tokens", disable=not progress) as bar:
                for some in pieces:
                    self._read(some, texts, found if losses else None)
                    bar.update(sum(piece.new for piece in some))
        finally:
            for number, size in zip(self._numbers, (self._now - self._first).tolist(), strict=True):
                self._contents.ledger.grow(number, size if self._store else 0)
        return found

    def __enter__(self) -> Reader:
        self._evaluating.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._evaluating.__exit__(*exception)
        for site in self._contents.sites:
            site.arrived = None
            site.forget_last()
        self._contents.reading.stand_at(self._now if self._store else self._first)

    def _read(self, pieces: list[Piece], texts: list[Tensor], losses: list[Tensor] | None) -> None:
        """Run the model on a piece of each of some texts, then remember what it has staged; losses: to be filled in."""
        rows = [piece.row for piece in pieces]
        tokens, mask = _padded([texts[piece.row][piece.start : piece.stop] for piece in pieces])
        starts = self._before[rows] + torch.tensor([piece.start for piece in pieces])
        reading = self._contents.reading
        reading.rows, reading.offsets, reading.staging = rows, starts, self._store
        device = device_of(self._model)
        out = run(self._model, tokens, attention_mask=mask.to(device), logits_to_keep=0 if losses is not None else 1)
        if losses is not None:
            _fill_in(losses, pieces, tokens, out.logits)
        if self._store:
            mask[:, : self._options.skip_first] = 0
            for i, piece in enumerate(pieces):  # what was read before, if reading stopped amidst a piece
                mask[i, : max(self._known[piece.row] - piece.start, 0)] = 0
            places = starts[:, None] + torch.arange(tokens.shape[1])
            origins = origins_of(torch.tensor(self._numbers)[rows], places.expand_as(tokens), tokens)
            arrived = [site.arrived for site in self._contents.sites]
            self._contents.store(arrived, [mask.bool()] * len(arrived), [origins] * len(arrived))
        for piece in pieces:
            self._now[piece.row] = self._before[piece.row] + piece.stop


def _padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) padded on the right with 0, and where they are: 1."""
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return tokens, (torch.arange(tokens.shape[1]) < lengths[:, None]).long()


def _fill_in(losses: list[Tensor], pieces: list[Piece], tokens: Tensor, logits: Tensor) -> None:
    """The losses of those tokens of the pieces that were in no piece before and have a token before them."""
    for piece, own, predicted in zip(pieces, tokens, logits, strict=True):
        size = piece.stop - piece.start
        each = F.cross_entropy(predicted[: size - 1].float(), own[1:size].to(predicted.device), reduction="none").cpu()
        first = max(size - piece.new, 1)
        losses[piece.row][piece.start + first : piece.stop] = each[first - 1 :]
