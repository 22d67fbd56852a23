"""Reading texts into a memory of spans, a piece at a time, and scoring them with what was read before.

Shapes: R rows of the memory, B rows in a batch, N tokens of a text, T tokens of a piece, G key/value heads, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from memorizing_transformers_pytorch.huggingface import prefix as prefixes
from memorizing_transformers_pytorch.huggingface.calls import Call
from memorizing_transformers_pytorch.huggingface.contents import Contents, Passed, origins_of
from memorizing_transformers_pytorch.huggingface.layer import Entries
from memorizing_transformers_pytorch.huggingface.models import evaluating, run
from memorizing_transformers_pytorch.huggingface.reading import Piece, padded, pieces_of
from memorizing_transformers_pytorch.huggingface.recall import QUERY, Recall
from memorizing_transformers_pytorch.huggingface.searching import Query
from memorizing_transformers_pytorch.huggingface.span_layer import SpanOptions, in_halves
from memorizing_transformers_pytorch.memory.ledger import Document

RECENT = 128  # tokens before a piece that stand before it when it is scored


class SpanReader:
    """As `Reader`, of a memory of spans.

    look_up: whether pieces are read with passages before them, a block of `every` tokens at a time, found by the tokens
    before the block.
    """

    def __init__(
        self,
        model: Any,
        contents: Contents,
        options: SpanOptions,
        recall: Recall,
        titles: list[str | None],
        goes_on: Document | None,
        *,
        store: bool,
        look_up: bool,
    ) -> None:
        self._model, self._contents, self._options = model, contents, options
        self._recall, self._layers, self._store, self._look_up = recall, recall.search.layers, store, look_up
        self._begun = {} if goes_on else dict(enumerate(titles))
        first = contents.ledger.next_number
        self._numbers = [goes_on.number] if goes_on else [first + row for row in range(len(titles))]
        self._known = goes_on.tokens if goes_on else 0
        self._pieces: list[Piece] = []
        _, read = contents.places_of(len(titles))
        self._starts = [place - self._known for place in read]

    def read_all(self, texts: list[Tensor], *, losses: bool, progress: bool) -> list[Tensor]:
        """Read what is not known of the texts -> if wanted, the loss of each of their tokens, NaN where there is none.

        What was read before an error stays.
        """
        found = [torch.full((len(text),), torch.nan) for text in texts]
        lengths, chunk = [len(text) for text in texts], self._options.chunk
        looks_up = losses or self._look_up
        overlap = min(RECENT, chunk // 2) if looks_up else self._options.overlap
        bar = tqdm(total=sum(lengths) - self._known, unit=" tokens", disable=not progress)
        with torch.inference_mode(False), evaluating(self._model), bar:
            for pieces in pieces_of(lengths, chunk, overlap, self._known):
                self._pieces = pieces
                tokens, mask = padded([texts[piece.row][piece.start : piece.stop] for piece in pieces])
                read = self._with_passages if looks_up else self._alone
                keys, entries = read(pieces, tokens, mask, found if losses else None)
                if self._store:
                    self._remember(pieces, tokens, mask, overlap, keys, entries)
                bar.update(sum(piece.new for piece in pieces))
        return found

    def _alone(self, _pieces: list[Piece], tokens: Tensor, mask: Tensor, _losses: Any) -> Any:
        """Read pieces by themselves -> the finder's keys (B, T, D), or keys and values of each layer."""
        if self._options.content == "tokens":
            finder = self._recall.search.finder
            return (None if finder is None else finder.vectors(self._model, tokens, mask)[1]), None
        cache = prefixes.new_cache()
        with self._recall.search.aside():
            run(self._model, tokens, attention_mask=mask, cache=cache)
        return None, self._unturned(cache, torch.zeros(len(tokens), dtype=torch.int64), 0)

    def _with_passages(self, pieces: list[Piece], tokens: Tensor, mask: Tensor, losses: list[Tensor] | None) -> Any:
        """As `_alone`, with passages before the pieces, filling in the losses."""
        finder, every, cache = self._recall.search.finder, self._options.every, prefixes.new_cache()
        vectors, keys = (None, None) if finder is None else finder.vectors(self._model, tokens, mask)
        context = int(min(piece.stop - piece.start - piece.new for piece in pieces))  # was read before
        logits, start = None, 0
        count = tokens.shape[1]
        while start < count:
            stop = min((context if start == 0 else start) + every, count)
            queries = self._queries(pieces, tokens, vectors, context if start == 0 else start)
            with self._recall.asked.at(queries):
                out = self._model(
                    input_ids=tokens[:, start:stop].to(self._model.device),
                    attention_mask=mask[:, :stop].to(self._model.device),
                    past_key_values=cache,
                    use_cache=True,
                )
            if losses is not None:
                logits = _fill_in(losses, pieces, tokens, start, logits, out.logits)
            start = stop
        if self._options.content == "tokens" or not self._store:
            return keys, None
        prefix = prefixes.prefix_of(cache)
        starts = torch.zeros(len(tokens), dtype=torch.int64) if prefix is None else prefix.starts.cpu()
        return keys, self._unturned(cache, starts, 0 if prefix is None else prefix.size)

    def _queries(self, pieces: list[Piece], tokens: Tensor, vectors: Tensor | None, start: int) -> list[Query]:
        """By what passages are found for the tokens from `start` on: those before them."""
        some = slice(max(start - QUERY, 0), start)
        return [
            Query(
                row,
                tokens[i, some],
                None if vectors is None else vectors[i, some],
                self._starts[piece.row] + piece.start,
            )
            for i, (row, piece) in enumerate(zip(self._rows_of(pieces), pieces, strict=True))
        ]

    def _rows_of(self, pieces: list[Piece]) -> list[int]:
        """Which rows of the memory these read."""
        rows, _ = self._contents.places_of(len(self._starts))
        return [piece.row if len(rows) == len(self._starts) else rows[0] for piece in pieces]

    def _unturned(self, cache: Any, starts: Tensor, size: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values (B, G, T, D) of what was read, by layer. starts: where it stands in each row."""
        entries = {}
        for (number, layer), held in zip(self._layers.items(), cache.layers, strict=True):
            keys, values = held.keys[:, :, size:], held.values[:, :, size:]
            places = starts[:, None] + torch.arange(keys.shape[2])
            entries[number] = (
                (keys if layer is None or layer.rotary is None else layer.rotary.turned(keys, -places)),
                values,
            )
        return entries

    def _remember(
        self, pieces: list[Piece], tokens: Tensor, mask: Tensor, overlap: int, keys: Tensor | None, entries: Any
    ) -> None:
        mask = mask.bool()
        for i, piece in enumerate(pieces):
            mask[i, : max(overlap if piece.start else 0, self._known - piece.start)] = False
        starts = torch.tensor([self._starts[piece.row] + piece.start for piece in pieces])
        places = (starts[:, None] + torch.arange(tokens.shape[1])).expand_as(tokens)
        origins = origins_of([self._numbers[piece.row] for piece in pieces], places, tokens)
        if self._options.content == "tokens":
            nothing = torch.zeros(*tokens.shape, 2)
            entries = {next(iter(self._contents.layers)): in_halves(nothing if keys is None else keys)}
        passed = Passed(
            [piece.row for piece in pieces],
            {index: Entries(pair[0], pair[1], mask, origins) for index, pair in entries.items()},
            {self._numbers[piece.row]: min(piece.new, piece.stop - self._known) for piece in pieces},
            {piece.row: self._starts[piece.row] + piece.stop for piece in pieces},
            self._begun,
        )
        self._contents.store(len(self._starts), passed)
        self._begun = {}

    def before(self, call: Call) -> None:
        """Have the call read the rows of the pieces of now."""
        call.rows = self._rows_of(self._pieces)

    def after(self, call: Call, failed: bool) -> None:
        """What the call has brought is stored by `read_all`."""


def _fill_in(
    losses: list[Tensor], pieces: list[Piece], tokens: Tensor, start: int, before: Tensor | None, logits: Tensor
) -> Tensor:
    """The losses of those tokens from `start` on that were in no piece before, by logits (B, T, V), and those of the
    token before (B, 1, V) -> the last ones."""
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
