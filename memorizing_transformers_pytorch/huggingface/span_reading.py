"""Reading texts into a memory of spans, a piece at a time, and scoring them with what was read before.

Shapes: R rows of the memory, B rows in a batch, N tokens of a text, T tokens of a piece, G key/value heads, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memorizing_transformers_pytorch.huggingface import prefix as prefixes
from memorizing_transformers_pytorch.huggingface.calls import Call
from memorizing_transformers_pytorch.huggingface.models import evaluating, run
from memorizing_transformers_pytorch.huggingface.reading import Pair, Piece, SideBySide, fill_in, no_losses, padded
from memorizing_transformers_pytorch.huggingface.recall import QUERY, Recall
from memorizing_transformers_pytorch.huggingface.searching import Query
from memorizing_transformers_pytorch.huggingface.span_layer import SpanOptions

RECENT = 128  # tokens before a piece that stand before it when it is scored


class SpanReader:
    """As `Reader`, of a memory of spans.

    look_up: whether pieces are read with passages before them, a block of `every` tokens at a time, found by the tokens
    before the block.
    """

    def __init__(
        self, model: Any, options: SpanOptions, recall: Recall, documents: SideBySide, *, store: bool, look_up: bool
    ) -> None:
        self._model, self._options, self._recall, self._documents = model, options, recall, documents
        self._store, self._look_up = store, look_up
        self._pieces: list[Piece] = []

    def read_all(self, texts: list[Tensor], *, losses: bool, progress: bool) -> list[Tensor]:
        """As `Reader.read_all`."""
        found, chunk, looks_up = no_losses(texts), self._options.chunk, losses or self._look_up
        overlap = min(RECENT, chunk // 2) if looks_up else self._options.overlap
        with torch.inference_mode(False), evaluating(self._model):
            for pieces in self._documents.pieces(texts, chunk, overlap, progress=progress):
                self._pieces, (tokens, mask) = pieces, padded(texts, pieces)
                if looks_up:
                    kept = self._with_passages(pieces, tokens, mask, found if losses else None)
                else:
                    kept = self._alone(tokens, mask)
                if self._store:
                    self._documents.store(pieces, tokens, mask, overlap if pieces[0].start else 0, kept)
        return found

    def _alone(self, tokens: Tensor, mask: Tensor) -> dict[int, Pair]:
        """Read pieces by themselves -> what is kept of them, by layer."""
        cache = prefixes.new_cache()
        if self._options.content == "kv":
            with self._recall.search.aside():
                run(self._model, tokens, attention_mask=mask, cache=cache)
        return self._recall.search.kept_of(cache, tokens, mask)

    def _with_passages(
        self, pieces: list[Piece], tokens: Tensor, mask: Tensor, losses: list[Tensor] | None
    ) -> dict[int, Pair]:
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
                logits = fill_in(losses, pieces, tokens, out.logits, start, logits)
            start = stop
        return self._recall.search.kept_of(cache, tokens, mask, keys) if self._store else {}

    def _queries(self, pieces: list[Piece], tokens: Tensor, vectors: Tensor | None, start: int) -> list[Query]:
        """By what passages are found for the tokens from `start` on: those before them."""
        some = slice(max(start - QUERY, 0), start)
        return [
            Query(
                row,
                tokens[i, some],
                None if vectors is None else vectors[i, some],
                self._documents.starts[piece.row] + piece.start,
            )
            for i, (row, piece) in enumerate(zip(self._documents.rows_of(pieces), pieces, strict=True))
        ]

    def before(self, call: Call) -> None:
        """Have the call read the rows of the pieces of now."""
        call.rows = self._documents.rows_of(self._pieces)

    def after(self, call: Call, failed: bool) -> None:
        """What the call has brought is stored by `read_all`."""
