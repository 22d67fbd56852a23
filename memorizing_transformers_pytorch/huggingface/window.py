"""While a model writes, its cache keeps the last tokens only: what leaves it is remembered.

Shapes: B rows, G key/value heads, T tokens of a call, C tokens kept, D head width.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from memorizing_transformers_pytorch.huggingface.calls import Call
from memorizing_transformers_pytorch.huggingface.contents import Contents, Pairs, origins_of


class _Windowed(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """Keeps the last `window` - 1 tokens for the next call, which sees them all."""

    def activate_past_recording(self) -> None:
        self.crop(0)

    def crop(self, *_: Any, **__: Any) -> None:
        raise ValueError("expected tokens that stay, with write='window': assisted decoding takes some back")

    def reorder_cache(self, *_: Any, **__: Any) -> None:
        raise ValueError("expected rows that stay, with write='window': beams change places")


class _OfFullAttention(_Windowed):  # type: ignore[no-untyped-call]
    """For layers whose own masks hide nothing that the window keeps."""

    is_sliding = False


def let_old_tokens_leave(cache: Any, window: int, remembered: list[int]) -> None:
    """Make a cache that holds nothing yet keep so many tokens. Raises ValueError for one that cannot.

    remembered: the layers with a memory.
    """
    if type(cache) is not DynamicCache:
        got = type(cache).__name__
        raise ValueError(f"expected a DynamicCache (the default of generate) with write='window', got {got}")
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _OfFullAttention(window)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = _Windowed(min(window, layer.sliding_window))
    kinds = {type(cache.layers[layer]).__name__ for layer in remembered if layer < len(cache.layers)}
    if not kinds <= {_Windowed.__name__, _OfFullAttention.__name__}:
        raise ValueError(f"expected layers of attention alone with write='window', got caches {sorted(kinds)}")
    if cache.layer_class_to_replicate is DynamicLayer:
        made: Any = functools.partial(_OfFullAttention, window)
        cache.layer_class_to_replicate = made


class Window:
    """A conversation: what passes through the model with one cache, which keeps the last `window` tokens.

    A cache that holds nothing yet begins another one; what the one before still kept is remembered then. ends: tokens
    after which nothing comes.
    """

    def __init__(self, contents: Contents, window: int, ends: Tensor) -> None:
        self._contents, self._window, self._ends = contents, window, ends
        self._call: Call | None = None
        self.drop()

    def before(self, call: Call) -> None:
        """Keep aside what this call does. Raises ValueError for calls of which nothing can be remembered."""
        if self._call is not None:  # the last one has failed: it is not known what its cache holds
            self._call, self._contents.reading.staging = None, False
            self.end()
        if call.cache is None:
            return
        if call.cache.get_seq_length() == 0:
            self._contents.make_rows(len(call.tokens))
            let_old_tokens_leave(call.cache, self._window, [site.index for site in self._contents.sites])
            self._begin(call)
        elif not self.goes_on_with(call.cache):
            expected = "expected the cache of the last conversation, or an empty one to begin another"
            raise ValueError(f"{expected} (past_key_values=DynamicCache()), got another one")
        self._call, self._contents.reading.staging = self._without_rest(call), True

    def goes_on_with(self, cache: Any) -> bool:
        """Whether this is the cache of the conversation."""
        return cache is not None and cache is self._cache

    def after(self) -> None:
        """Remember what has left the cache in this call."""
        call, self._call = self._call, None
        if call is not None:
            self._contents.reading.staging = False
            for site in self._contents.sites:
                site.settle()
            self._take_in(call)
            layers = self._cache.layers
            self._let_go([layers[site.index].sliding_window - 1 for site in self._contents.sites])

    def _without_rest(self, call: Call) -> Call:
        """`generate` goes on with rows that have ended, token by token, until all have: that is padding."""
        if call.tokens.shape[1] > 1:
            self._ended = torch.zeros(len(call.tokens), dtype=torch.bool)
            return call
        seen = call.seen.clone()
        seen[:, -1] &= ~self._ended
        self._ended = self._ended | torch.isin(call.tokens[:, 0], self._ends)
        return replace(call, seen=seen)

    def end(self) -> None:
        """Remember what the cache still keeps. The conversation cannot be gone on with."""
        if self._cache is not None and all(pair is not None for pair in self._kept):
            self._let_go([0] * len(self._kept))
            self._contents.reading.offsets = self._contents.reading.offsets + self._passed
        self.drop()

    def drop(self) -> None:
        """Forget what the cache still keeps. The conversation cannot be gone on with."""
        self._cache: Any = None
        self._kept: list[Pairs | None] = []

    def _begin(self, call: Call) -> None:
        self.end()
        rows = len(call.tokens)
        self._numbers = self._contents.begin([None] * rows)
        self._cache, self._kept = call.cache, [None] * len(self._contents.sites)
        self._passed = torch.zeros(rows, dtype=torch.int64)
        self._ended = torch.zeros(rows, dtype=torch.bool)
        self._mask = torch.zeros(rows, 0, dtype=torch.bool)
        self._origins = torch.zeros(rows, 0, 3, dtype=torch.int64)

    def _take_in(self, call: Call) -> None:
        """What has arrived in this call is kept."""
        places = self._contents.reading.offsets[:, None] + call.places
        origins = origins_of(torch.tensor(self._numbers), places, call.tokens)
        self._mask = torch.cat((self._mask, call.mask), dim=1)
        self._origins = torch.cat((self._origins, origins), dim=1)
        self._passed = torch.maximum(self._passed, call.next_places)
        for number, tokens in zip(self._numbers, call.mask.sum(dim=1).tolist(), strict=True):
            self._contents.ledger.grow(number, tokens)
        for i, site in enumerate(self._contents.sites):
            assert site.arrived is not None
            self._kept[i] = _joined(self._kept[i], site.arrived)
            site.arrived = None

    def _let_go(self, kept: list[int]) -> None:
        """Remember, of what is kept for each layer, all but the last so many tokens."""
        pairs: list[Pairs | None] = []
        masks, origins = [], []
        for i, (pair, count) in enumerate(zip(self._kept, kept, strict=True)):
            assert pair is not None
            total = pair[0].shape[2]
            leaving = max(total - count, 0)
            first = self._mask.shape[1] - total
            pairs.append((pair[0][:, :, :leaving], pair[1][:, :, :leaving]))
            masks.append(self._mask[:, first : first + leaving])
            origins.append(self._origins[:, first : first + leaving])
            self._kept[i] = pair[0][:, :, leaving:], pair[1][:, :, leaving:]
        self._contents.store(pairs, masks, origins)
        longest = max(pair[0].shape[2] for pair in self._kept if pair is not None)
        self._mask = self._mask[:, self._mask.shape[1] - longest :]
        self._origins = self._origins[:, self._origins.shape[1] - longest :]


def _joined(before: Pairs | None, new: Pairs) -> Pairs:
    if before is None:
        return new
    return torch.cat((before[0], new[0]), dim=2), torch.cat((before[1], new[1]), dim=2)


def ends_of(model: Any) -> Tensor:
    """The tokens with which the model ends a text."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return torch.tensor([] if ends is None else ends, dtype=torch.int64).flatten()
