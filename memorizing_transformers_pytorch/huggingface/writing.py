"""What passes through a model in training (`TrainingSegment`) and in a conversation (`Window`), to be stored.

Shapes: B rows, G key/value heads, T tokens of a call, C tokens kept, D head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from memorizing_transformers_pytorch.huggingface.calls import Call, Lock, runs_inside
from memorizing_transformers_pytorch.huggingface.contents import Contents, Passed, Titles, checked_titles, origins_of
from memorizing_transformers_pytorch.huggingface.layer import Entries

Pairs = tuple[Tensor, Tensor]
"""Keys and values (B, G, T, D)."""
NO_BEAMS = "expected rows that stay, with write='window': beams change places"
NO_ASSISTANT = "expected tokens that stay, with write='window': assisted decoding takes some back"


class TrainingSegment:
    """What the model is given in one call, in training, is stored when the backward pass is over."""

    def __init__(self, contents: Contents, titles: Titles, skip_first: int) -> None:
        self._contents, self._titles, self._skip_first = contents, titles, skip_first
        self._call: Call | None = None

    def before(self, call: Call) -> None:
        """Raises ValueError for a call that goes on with a cache, a second one, or one that does not fit."""
        if self._call is not None or call.before:
            got = "another one" if self._call is not None else "one that goes on with a cache"
            raise ValueError(f"expected one call of the model with a whole segment inside writing(), got {got}")
        rows = call.shape[0]
        checked_titles(self._titles, rows)
        call.rows, call.offsets = self._contents.places_of(rows)
        call.check_order()
        call.keeps_pairs, self._call = True, call

    def after(self, call: Call, failed: bool) -> None:
        if failed:
            self._call = None

    @property
    def is_over(self) -> bool:
        """Whether the call was made."""
        return self._call is not None

    def store(self) -> None:
        """Store what the call has brought: each row goes on with its document, or begins one."""
        contents, call = self._contents, self._call
        assert call is not None
        rows, known = call.shape[0], contents.ledger.next_number
        titles, numbers, begun = checked_titles(self._titles, rows), [], dict[int, str | None]()
        for row in range(rows):
            latest = contents.ledger.latest(row)
            if latest is None:
                latest, begun[row] = known + len(begun), titles[row]
            numbers.append(latest)
        offsets = torch.tensor(call.offsets)
        mask = call.mask & (call.mask.cumsum(dim=1) > self._skip_first)
        origins = origins_of(numbers, offsets[:, None] + call.places, call.tokens)
        passed = Passed(
            list(range(rows)),
            {index: Entries(*pair, mask, origins) for index, pair in call.pairs.items()},
            dict(zip(numbers, call.mask.sum(dim=1).tolist(), strict=True)),
            dict(enumerate((offsets + next_places(call)).tolist())),
            begun,
        )
        contents.store(rows, passed)


class _Windowed(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """Keeps the last `window` - 1 tokens for the next call, which sees them all."""

    def activate_past_recording(self) -> None:
        raise ValueError(NO_ASSISTANT)

    def crop(self, *_: Any, **__: Any) -> None:
        raise ValueError(NO_ASSISTANT)

    def reorder_cache(self, *_: Any, **__: Any) -> None:
        raise ValueError(NO_BEAMS)


class _OfFullAttention(_Windowed):  # type: ignore[no-untyped-call]
    """For layers whose own masks hide nothing that the window keeps."""

    is_sliding = False


def check_cache(cache: Any, remembered: list[int]) -> None:
    """Raises ValueError for a new cache that cannot let old tokens leave. remembered: the layers with a memory."""
    if type(cache) is not DynamicCache:
        got = type(cache).__name__
        raise ValueError(f"expected a DynamicCache (the default of generate) with write='window', got {got}")
    kinds = {type(cache.layers[layer]) for layer in remembered if layer < len(cache.layers)}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        names = sorted(kind.__name__ for kind in kinds)
        raise ValueError(f"expected layers of attention alone with write='window', got caches {names}")


def let_old_tokens_leave(cache: Any, window: int) -> None:
    """Make a cache that holds nothing yet keep so many tokens."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _OfFullAttention(window)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = _Windowed(min(window, layer.sliding_window))
    if cache.layer_class_to_replicate is DynamicLayer:
        made: Any = functools.partial(_OfFullAttention, window)
        cache.layer_class_to_replicate = made


@dataclass(eq=False)
class Conversation:
    """What passes through the model with one cache.

    starts: how many tokens each row had read before. passed: how many have passed since. mask, origins: of the tokens
    of which a layer keeps pairs (kept), those that have not left its cache. numbers: of the documents, none before the
    first call is over. ended: rows in which `generate` has written the end of the text.
    """

    cache: Any
    starts: list[int]
    passed: Tensor
    ended: Tensor
    mask: Tensor
    origins: Tensor
    kept: dict[int, Pairs]
    numbers: list[int]


class Ends:
    """Which rows of a conversation have ended: by tokens after which nothing comes, and what `generate` writes then."""

    def __init__(self, model: Any) -> None:
        config = getattr(model, "generation_config", None)
        self._ends = _tokens(getattr(config, "eos_token_id", None))
        self._pads = torch.cat((self._ends, _tokens(getattr(config, "pad_token_id", None))))

    def padding(self, ended: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """(B,) bool, rows that have ended -> (B,) those with which `generate` goes on, token by token, until all have;
        and which have ended now."""
        if call.shape[1] > 1 or runs_inside("_prefill"):  # a text that was given, not written
            nothing = torch.zeros_like(ended)
            return nothing, nothing
        tokens = call.tokens[:, 0]
        written = torch.isin(tokens, self._pads) | (bool(ended.any()) and runs_inside("_sample"))
        padding = ended & written & ~ended.all()
        return padding, padding | torch.isin(tokens, self._ends)


def check_conversation(call: Call, current: Any) -> None:
    """Raises ValueError for a call of which nothing can be stored. current: the cache of the conversation."""
    if call.before and current is not call.cache:
        expected = "expected the cache of the last conversation, or an empty one to begin another"
        raise ValueError(f"{expected} (past_key_values=DynamicCache()), got another one")
    if not call.before:
        if runs_inside("_beam_search"):
            raise ValueError(NO_BEAMS)
        if runs_inside("_assisted_decoding"):
            raise ValueError(NO_ASSISTANT)
    call.check_order()


class Window:
    """A conversation at a time, whose cache keeps the last `window` tokens; what leaves it is stored.

    A cache that holds nothing yet begins another one; what the one before still kept is stored then.
    """

    def __init__(self, contents: Contents, window: int, model: Any, lock: Lock) -> None:
        self._contents, self._window, self._lock = contents, window, lock
        self._ends = Ends(model)
        self._current: Conversation | None = None

    def before(self, call: Call) -> None:
        """Have what the call brings stored. Nobody else changes the memory until `after`.

        Raises ValueError, changing nothing, for calls of which nothing can be stored.
        """
        self._lock.acquire()
        try:
            self._prepare(call)
        except BaseException:
            self._lock.release()
            raise

    def _prepare(self, call: Call) -> None:
        current = self._current
        rows, starts = self._contents.places_of(call.shape[0])
        check_conversation(call, None if current is None else current.cache)
        if not call.before:
            check_cache(call.cache, list(self._contents.layers))
            self.end()
            let_old_tokens_leave(call.cache, self._window)
            current = self._current = self._begun(call, starts)
        assert current is not None
        call.memories = self._contents.state.memories
        call.rows, call.offsets, call.keeps_pairs = rows, current.starts, True

    def _begun(self, call: Call, starts: list[int]) -> Conversation:
        rows = call.shape[0]
        return Conversation(
            call.cache,
            starts,
            torch.zeros(rows, dtype=torch.int64),
            torch.zeros(rows, dtype=torch.bool),
            torch.zeros(rows, 0, dtype=torch.bool),
            torch.zeros(rows, 0, 3, dtype=torch.int64),
            {},
            [],
        )

    def goes_on_with(self, cache: Any) -> bool:
        """Whether this is the cache of the conversation."""
        return cache is not None and self._current is not None and cache is self._current.cache

    def after(self, call: Call, failed: bool) -> None:
        """Store what has left the cache in this call. One that failed ends the conversation: it is not known what its
        cache holds."""
        try:
            if not failed:
                self._current = self._with(call)
        except BaseException:
            failed = True
            raise
        finally:
            if failed:
                self.end()
            self._lock.release()

    def _with(self, call: Call) -> Conversation:
        """The conversation after this call, of which has been stored what has left the cache."""
        assert self._current is not None
        now, rows, begun = replace(self._current, kept=dict(self._current.kept)), call.shape[0], {}
        if not now.numbers:
            first = self._contents.ledger.next_number
            now.numbers, begun = [first + row for row in range(rows)], dict.fromkeys(range(rows))
        padding, now.ended = self._ends.padding(now.ended, call)
        mask = call.mask & ~padding[:, None]
        places = torch.tensor(now.starts)[:, None] + call.places
        now.mask = torch.cat((now.mask, mask), dim=1)
        now.origins = torch.cat((now.origins, origins_of(now.numbers, places, call.tokens)), dim=1)
        now.passed = torch.maximum(now.passed, next_places(call, mask))
        for index, new in call.pairs.items():
            now.kept[index] = _joined(now.kept.get(index), new)
        counts = {index: now.cache.layers[index].sliding_window - 1 for index in now.kept}
        tokens = dict(zip(now.numbers, mask.sum(dim=1).tolist(), strict=True))
        self._store(now, counts, tokens, begun)
        return now

    def end(self) -> None:
        """Store what the cache still keeps. The conversation cannot be gone on with."""
        now = self._current
        self.drop()
        if now is not None and now.kept:
            self._store(now, dict.fromkeys(now.kept, 0), {}, {})

    def drop(self) -> None:
        """Forget what the cache still keeps. The conversation cannot be gone on with."""
        self._current = None

    def _store(self, now: Conversation, counts: dict[int, int], tokens: dict[int, int], begun: Any) -> None:
        """Store, of what is kept for each layer, all but the last so many tokens."""
        entries = {}
        for index, (keys, values) in now.kept.items():
            total = keys.shape[2]
            leaving = max(total - counts[index], 0)
            first = now.mask.shape[1] - total
            some = slice(first, first + leaving)
            going = keys[:, :, :leaving], values[:, :, :leaving]
            entries[index] = Entries(*going, now.mask[:, some], now.origins[:, some])
            now.kept[index] = keys[:, :, leaving:], values[:, :, leaving:]
        offsets = (now.passed + torch.tensor(now.starts)).tolist()
        rows = list(range(len(offsets)))
        self._contents.store(len(rows), Passed(rows, entries, tokens, dict(enumerate(offsets)), begun))
        longest = max(keys.shape[2] for keys, _ in now.kept.values())
        now.mask = now.mask[:, now.mask.shape[1] - longest :]
        now.origins = now.origins[:, now.origins.shape[1] - longest :]


def next_places(call: Call, mask: Tensor | None = None) -> Tensor:
    """(B,): what comes after the last token that is no padding; 0 where all are."""
    return ((call.places + 1) * (call.mask if mask is None else mask)).amax(dim=1)


def _joined(before: Pairs | None, new: Pairs) -> Pairs:
    if before is None:
        return new
    return torch.cat((before[0], new[0]), dim=2), torch.cat((before[1], new[1]), dim=2)


def _tokens(ids: Any) -> Tensor:
    return torch.tensor([] if ids is None else ids, dtype=torch.int64).flatten()
