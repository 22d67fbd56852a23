"""A chat that goes on for ever with a memory of spans: what leaves its cache is stored, and recalled when it fits.

Shapes: B rows, G key/value heads, W tokens of the text that the cache holds, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from memorizing_transformers_pytorch.huggingface import prefix as prefixes
from memorizing_transformers_pytorch.huggingface.calls import Call, Lock
from memorizing_transformers_pytorch.huggingface.contents import Contents, Passed, origins_of
from memorizing_transformers_pytorch.huggingface.layer import Entries
from memorizing_transformers_pytorch.huggingface.searching import Search
from memorizing_transformers_pytorch.huggingface.span_layer import SpanOptions
from memorizing_transformers_pytorch.huggingface.writing import Ends, check_conversation
from memorizing_transformers_pytorch.utils.fingerprint import Weights

NO_CACHE = "write='window' needs a DynamicCache (the default of generate), got"


@dataclass(eq=False)
class _Chat:
    """The conversation that goes on. starts: how many tokens each row had read before. mask, tokens, places (B, W): of
    what the cache holds. ended: (B,) rows that have ended. numbers: of the documents, none before anything is stored.
    """

    cache: Any
    starts: list[int]
    ended: Tensor
    mask: Tensor
    tokens: Tensor
    places: Tensor
    numbers: list[int]


class SpanWindow:
    """A conversation at a time, whose cache keeps the last `window` tokens, and up to `every` more.

    A cache that holds nothing yet begins another one; what the one before still kept is stored then.
    """

    def __init__(
        self, contents: Contents, options: SpanOptions, model: Any, lock: Lock, search: Search, weights: Weights
    ) -> None:
        self._contents, self._options, self._lock, self._search, self._weights = (
            contents,
            options,
            lock,
            search,
            weights,
        )
        self._ends = Ends(model)
        self._current: _Chat | None = None

    @property
    def _window(self) -> int:
        assert self._options.window is not None
        return self._options.window

    def goes_on_with(self, cache: Any) -> bool:
        """Whether this is the cache of the conversation."""
        return cache is not None and self._current is not None and cache is self._current.cache

    def before(self, call: Call) -> None:
        """Store what has left the cache. Nobody else changes the memory until `after`.

        Raises ValueError, changing nothing, for calls of which nothing can be stored.
        """
        self._lock.acquire()
        try:
            current = self._current
            check_conversation(call, None if current is None else current.cache)
            if not call.before:
                if type(call.cache) is not DynamicCache:
                    raise ValueError(f"{NO_CACHE} {type(call.cache).__name__}")
                _, starts = self._contents.places_of(call.shape[0])
                self.end()
                self._current = _begun(call, starts)
            elif current is not None and current.mask.shape[1] > self._window + self._options.every:
                self._store(current, current.mask.shape[1] - self._window)
            rows, _ = self._contents.places_of(call.shape[0])
            call.rows, call.memories, call.is_kept = rows, self._contents.state.memories, True
        except BaseException:
            self._lock.release()
            raise

    def after(self, call: Call, failed: bool) -> None:
        """Note what has passed. A call that failed ends the conversation: it is not known what its cache holds."""
        try:
            if failed or self._current is None:
                self.end()
                return
            now = self._current
            padding, now.ended = self._ends.padding(now.ended, call)
            now.mask = torch.cat((now.mask, call.mask & ~padding[:, None]), dim=1)
            now.tokens = torch.cat((now.tokens, call.tokens), dim=1)
            now.places = torch.cat((now.places, call.places), dim=1)
        finally:
            self._lock.release()

    def end(self) -> None:
        """Store what the cache still keeps. The conversation cannot be gone on with."""
        now = self._current
        self.drop()
        if now is not None and now.mask.shape[1]:
            self._store(now, now.mask.shape[1])

    def drop(self) -> None:
        """Forget what the cache still keeps. The conversation cannot be gone on with."""
        self._current = None

    def _store(self, now: _Chat, count: int) -> None:
        """Move the first `count` tokens of the text from the cache into the memory."""
        rows, begun = list(range(len(now.mask))), {}
        if not now.numbers:
            first = self._contents.ledger.next_number
            now.numbers, begun = [first + row for row in rows], dict.fromkeys(rows)
        mask, tokens, places = (part[:, :count] for part in (now.mask, now.tokens, now.places))
        starts = torch.tensor(now.starts)
        origins = origins_of(now.numbers, starts[:, None] + places, tokens)
        pairs = self._search.kept_of(now.cache, tokens, mask, places=places)
        entries = {index: Entries(keys, values, mask, origins) for index, (keys, values) in pairs.items()}
        passed = dict(zip(now.numbers, mask.sum(dim=1).tolist(), strict=True))
        offsets = starts + ((now.places + 1) * now.mask)[:, :count].amax(dim=1)
        if not self._contents.ledger:
            self._weights.have_written()
        self._contents.store(len(rows), Passed(rows, entries, passed, dict(enumerate(offsets.tolist())), begun))
        now.mask, now.tokens, now.places = (part[:, count:] for part in (now.mask, now.tokens, now.places))
        if now.mask.shape[1]:
            prefixes.drop(now.cache, count, now.places[:, 0], self._search.turned)


def _begun(call: Call, starts: list[int]) -> _Chat:
    nothing = torch.zeros(call.shape[0], 0, dtype=torch.int64)
    ended = torch.zeros(call.shape[0], dtype=torch.bool)
    return _Chat(call.cache, starts, ended, nothing.bool(), nothing, nothing, [])
