"""Finding passages in a memory, as keys and values that can stand before a text.

Shapes: B rows of the batch, R rows of the memory, G key/value heads, N entries of a row, P positions of passages,
T tokens, D head width.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memorizing_transformers_pytorch.huggingface import prefix as prefixes
from memorizing_transformers_pytorch.huggingface.calls import Call, Shared, State
from memorizing_transformers_pytorch.huggingface.finder import Finder
from memorizing_transformers_pytorch.huggingface.models import check_ids, evaluating, run, vocabulary_of
from memorizing_transformers_pytorch.huggingface.prefix import Pairs
from memorizing_transformers_pytorch.huggingface.probe import Layer
from memorizing_transformers_pytorch.huggingface.span_layer import SpanOptions, finder_keys, in_halves
from memorizing_transformers_pytorch.huggingface.spans import (
    SMOOTHED,
    Hit,
    around,
    attention,
    choose,
    hits,
    smoothed,
    starts_of,
)
from memorizing_transformers_pytorch.huggingface.words import WordIndex
from memorizing_transformers_pytorch.memory.entries import ORIGIN_FIELDS, POSITION
from memorizing_transformers_pytorch.memory.store import Store

BESIDE_WORDS = 0.5  # the power of attention beside words, which find rare ones: experiments/recall_ranking.py

Entries = dict[int, list[tuple[Tensor, Tensor]]]


@dataclass(eq=False)
class Query:
    """By what a row of the batch finds passages in a row of the memory: tokens (T,), or what the finder has made of
    them (T, D). before: entries from this place of the row on are not recalled."""

    row: int
    tokens: Tensor
    vectors: Tensor | None = None
    before: int | None = None


@dataclass(eq=False)
class Recalled:
    """What a row of the batch has before its text: the row of the memory, origins (P, 3) of the entries, which of these
    were hits and with what score, the best first."""

    row: int
    origins: Tensor
    hits: list[Hit]
    slots: Tensor


class _Held(NamedTuple):
    """Entries of a row in the order in which they were read: their slots (N,), origins (N, 3), and where the document
    of each begins (N,)."""

    slots: Tensor
    origins: Tensor
    starts: Tensor


class Search:
    """Finds passages in what is remembered.

    layers: of the model, which have a cache, by number, and what is known of them. finder: None where words alone find.
    """

    def __init__(
        self,
        model: Any,
        shared: Shared,
        options: SpanOptions,
        finder: Finder | None,
        layers: Mapping[int, Layer | None],
        tokenizer: Any,
    ) -> None:
        self._model, self._shared, self._options = model, shared, options
        self.finder, self.layers = finder, layers
        self._words = WordIndex(tokenizer) if options.finder != "head" else None

    @property
    def kept(self) -> int:
        """By which number of a layer the finder's keys lie."""
        return next(iter(self._shared.state.memories)) if self.finder is None else self.finder.head.layer

    @property
    def can_turn(self) -> bool:
        """Whether a text can be moved to other positions."""
        return all(layer is not None and not layer.embedded for layer in self.layers.values())

    def turned(self, i: int, keys: Tensor, by: Tensor) -> Tensor:
        """Keys (B, G, T, D) of the i-th layer, turned on by so many positions (B,) or (B, T)."""
        rotary = self.known(i).rotary
        return keys if rotary is None else rotary.turned(keys, by if by.ndim == 2 else by[:, None]).to(keys.dtype)

    def kept_of(
        self, cache: Any, tokens: Tensor, mask: Tensor, keys: Tensor | None = None, places: Tensor | None = None
    ) -> dict[int, Pairs]:
        """What is kept of tokens (B, T), the first ones of the text in a cache, by layer. keys: what the finder has
        made of them, if known. places: (B, T) of the text, unless it begins with them."""
        if self._options.content == "kv":
            pairs, at = prefixes.taken(cache, tokens.shape[1], places)
            return {
                number: (self.turned(i, keys, -at), values)
                for i, (number, (keys, values)) in enumerate(zip(self.layers, pairs, strict=True))
            }
        if keys is None and self.finder is not None:
            keys = self.finder.vectors(self._model, tokens, mask.long())[1]
        return {self.kept: in_halves(torch.zeros(*tokens.shape, 2) if keys is None else keys)}

    def known(self, i: int) -> Layer:
        """The i-th layer. (Where nothing is known of a layer, nothing is turned.)"""
        layer = list(self.layers.values())[i]
        assert layer is not None
        return layer

    def pairs_for(self, queries: Sequence[Query], budget: int) -> tuple[list[Recalled], list[Pairs], Tensor]:
        """What to recall, as keys and values for each layer, turned to where they stand, and which positions of each
        row are taken (B, P): False for padding on the left."""
        unique, which = _unique(queries)
        vectors, state = self._vectors(unique), self._shared.state
        store = state.memories[self.kept][0].store
        with store.lock:  # whoever changes the memory holds it too
            found = [self._found(store, query, own, budget) for query, own in zip(unique, vectors, strict=True)]
            entries = self._entries(state, found) if self._options.content == "kv" else {}
        mask = _left_padded([torch.ones(len(each.slots), dtype=torch.bool) for each in found])
        places = (mask.cumsum(dim=1) - 1).clamp_min(0)
        pairs = (
            self._read_again(found, mask)
            if self._options.content == "tokens"
            else [self._placed(i, own, places) for i, own in entries.items()]
        )
        if which != list(range(len(found))):
            order = torch.tensor(which)
            mask = mask[order]
            pairs = [(keys[order.to(keys.device)], values[order.to(values.device)]) for keys, values in pairs]
        return [found[i] for i in which], pairs, mask.to(self._model.device)

    def _vectors(self, queries: Sequence[Query]) -> list[Tensor | None]:
        """What the finder makes of the tokens of each query, (T, D)."""
        if self.finder is None:
            return [None] * len(queries)
        asked = [i for i, query in enumerate(queries) if query.vectors is None and len(query.tokens)]
        found = [query.vectors for query in queries]
        if asked:
            texts = [queries[i].tokens for i in asked]
            mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
            made, _ = self.finder.vectors(self._model, pad_sequence(texts, batch_first=True), mask)
            for i, own in zip(asked, made, strict=True):
                found[i] = own[: len(queries[i].tokens)]
        return found

    def best(self, query: Query, count: int) -> list[tuple[Tensor, float]]:
        """The passages that fit best, the best first, and how well: origins (P, 3) of each."""
        vectors = self._vectors([query])[0]
        store = self._shared.state.memories[self.kept][0].store
        with store.lock:
            row = self._row(store, query)
            if row is None:
                return []
            scores, starts = self._scores(store, query, vectors, row).cpu(), row.starts.cpu()
            found = hits(scores, self._options.span // 2 + SMOOTHED // 2)
            return [
                (row.origins[around(hit.place, starts, self._options.span)].cpu(), hit.score)
                for hit in itertools.islice(found, count)
            ]

    def _row(self, store: Store, query: Query) -> _Held | None:
        """What a row holds that may be recalled; None if that is nothing, or there is nothing to find it by."""
        slots = store.places_in_order(query.row)
        origins = store.origins[query.row][slots]
        if query.before is not None:
            count = int((origins[:, POSITION] < query.before).sum())
            slots, origins = slots[:count], origins[:count]
        if len(slots) == 0 or len(query.tokens) == 0:
            return None
        return _Held(slots, origins, starts_of(origins[:, 0]))

    def _found(self, store: Store, query: Query, vectors: Tensor | None, budget: int) -> Recalled:
        row = self._row(store, query)
        if row is None:
            return Recalled(query.row, torch.zeros(0, ORIGIN_FIELDS, dtype=torch.int64), [], torch.zeros(0).long())
        scores = self._scores(store, query, vectors, row)
        chosen = choose(scores.cpu(), row.starts.cpu(), budget, self._options.span, self._options.first)
        hidden = self._shared.state.memories[self.kept][0].hidden.now
        if hidden is not None:
            chosen = chosen.without(hidden.among(row.origins[chosen.places.to(row.slots.device)]).cpu())
        places = chosen.places.to(row.slots.device)
        return Recalled(query.row, row.origins[places].cpu(), chosen.hits, row.slots[places])

    def _scores(self, store: Store, query: Query, vectors: Tensor | None, row: _Held) -> Tensor:
        """(N,) how well each entry, in order, fits the query: by the head, by words, or by the mean of both, each as a
        share of its best. (Where only a part of the row may be recalled, the head alone: words are indexed for all.)"""
        found, index = [], self._words if self.finder is None or query.before is None else None
        if vectors is not None and self.finder is not None:
            kv_head = self.finder.kv_head if self._options.content == "kv" else None
            keys = finder_keys(store, query.row, kv_head)
            power = 1.0 if index is None else BESIDE_WORDS
            weights = attention(vectors.to(store.device), keys, store.filled[query.row], power)
            found.append(smoothed(weights[row.slots], row.starts))
        if index is not None:
            words = index.scores(store, query.row, query.tokens, row.origins, row.starts)
            found.append(words.to(store.device))
        best = [each / each.max().clamp_min(torch.finfo(torch.float32).tiny) for each in found]
        return found[0] if len(found) == 1 else torch.stack(best).mean(dim=0)

    def _entries(self, state: State, found: Sequence[Recalled]) -> Entries:
        """Copies of the keys and values of each layer, (G, P, D) for each of these."""
        entries: Entries = {}
        for i, number in enumerate(self.layers):
            layer, store, own = self.known(i), state.memories[number][0].store, []
            for each in found:
                some = [part[each.row].at(each.slots).floats() for part in (store.keys, store.values)]
                own.append((some[0].to(layer.device), some[1].to(layer.device)))
            entries[i] = own
        return entries

    def _placed(self, i: int, entries: list[tuple[Tensor, Tensor]], places: Tensor) -> Pairs:
        """Keys and values (G, P, D) of some rows -> of a batch, padded on the left, keys at their places (B, P)."""
        layer = self.known(i)
        keys, values = (_left_padded([pair[j].transpose(0, 1) for pair in entries]).transpose(1, 2) for j in (0, 1))
        if layer.rotary is not None:
            keys = layer.rotary.turned(keys, places)
        return keys.to(layer.dtype), values.to(layer.dtype)

    def _read_again(self, found: Sequence[Recalled], mask: Tensor) -> list[Pairs]:
        """The passages go through the model once more -> the keys and values of each layer."""
        tokens = _left_padded([each.origins[:, 2] for each in found])
        cache = prefixes.new_cache()
        check_ids(tokens, vocabulary_of(self._model), "the memory")
        if tokens.numel() == 0:
            return [(torch.empty(0), torch.empty(0))] * len(self.layers)
        with evaluating(self._model), self.aside():
            run(self._model, tokens, attention_mask=mask.long(), cache=cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, calls of the model are its own: nothing is recalled, and nothing kept."""
        with self._shared.call.at(Call({}, {}, [], [], enabled=False)):
            yield


def _unique(queries: Sequence[Query]) -> tuple[list[Query], list[int]]:
    """The different ones of these, and which of them each is: beams begin alike."""
    known: dict[tuple[Any, ...], int] = {}
    which = []
    for i, query in enumerate(queries):
        own = None if query.vectors is None else i  # these hold what came before the tokens too
        which.append(known.setdefault((query.row, query.before, own, *query.tokens.tolist()), len(known)))
    return [queries[which.index(i)] for i in range(len(known))], which


def _left_padded(rows: Sequence[Tensor]) -> Tensor:
    """Of different lengths (P, ...) -> (B, P, ...), with zeros on the left."""
    most = max(len(row) for row in rows)
    return torch.stack([torch.cat((row.new_zeros((most - len(row), *row.shape[1:])), row)) for row in rows])
