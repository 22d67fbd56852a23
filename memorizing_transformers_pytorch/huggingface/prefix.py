"""Passages in a cache: they stand before the text, and whoever holds the cache sees only the text.

A cache of transformers has a layer object for each layer of the model. `place` exchanges these for ones that begin with
the keys and values of passages. During a call of the model the cache is as long as it is; before and after, its length
is that of the text alone, so that `generate` and its callers count as they do without a memory.

Shapes: B rows, G key/value heads, P positions of passages, S positions of the text in the cache, T tokens of a call,
D head width, Q tokens of which passages are chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.cache_utils import StaticSlidingWindowLayer as StaticSliding

Pairs = tuple[Tensor, Tensor]
"""Keys and values (B, G, P, D) of a layer, turned to positions 0 ... P - 1 of each row."""
Turn = Callable[[Tensor], Tensor]
Turned = Callable[..., Tensor]
"""Turns keys (B, G, T, D) of the i-th layer by so many positions (B,)."""


class Prefix:
    """What the layers of one cache share.

    size: P. mask: (B, P) bool, False for padding, which is on the left. starts: (B,), at which position the text of
    each row begins. is_full: whether no row has padding. tokens: (B, at most Q), the last ones of the text. passed:
    tokens of the text since passages were chosen. is_due: whether they shall be chosen anew. dropped: tokens of the
    text that have left the cache, and gone: (B,), how many positions these took. has_text: whether there is any.
    is_visible: whether a call is running, which sees the passages.
    """

    def __init__(self, mask: Tensor) -> None:
        self.begin(mask)

    def begin(self, mask: Tensor) -> None:
        """Stand before a text of which nothing has passed."""
        self.dropped, self.is_visible, self.has_text = 0, False, False
        self.gone = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
        self.tokens: Tensor | None = None
        self.exchange(mask, mask.sum(dim=1))

    def exchange(self, mask: Tensor, starts: Tensor) -> None:
        """Other passages, (B, P) of which are no padding."""
        self.mask, self.starts, self.is_full, self.passed, self.is_due = mask, starts, bool(mask.all()), 0, False

    @property
    def size(self) -> int:
        return self.mask.shape[1]

    @property
    def shift(self) -> int:
        """What the length of the cache differs from that of the text."""
        return 0 if self.is_visible else self.size - self.dropped

    def note(self, tokens: Tensor, most: int) -> None:
        """Tokens (B, T) of the text have passed; the last ones are kept."""
        tokens = tokens.to(self.mask.device)
        self.tokens = (tokens if self.tokens is None else torch.cat((self.tokens, tokens), dim=1))[:, -most:]
        self.passed, self.has_text = self.passed + tokens.shape[1], True

    def take(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        rows = rows.to(self.mask.device)
        self.mask, self.starts, self.gone = self.mask[rows], self.starts[rows], self.gone[rows]
        self.tokens = None if self.tokens is None else self.tokens[rows]

    def drop_last(self, count: int) -> None:
        """So many tokens of the text were taken back."""
        self.passed = max(self.passed - count, 0)
        self.tokens = None if self.tokens is None else self.tokens[:, : max(self.tokens.shape[1] - count, 0)]


class DynamicWithPassages(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a growing cache. It keeps all of the text, also where the layer attends to a window of it: the masks
    of the model hide what lies before that. leads: whether it tells the prefix of changes: the first layer does."""

    keys: Any
    values: Any

    def __init__(self, prefix: Prefix, leads: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix, self._leads = prefix, leads

    def get_seq_length(self) -> int:
        length: int = super().get_seq_length()
        return max(length - self.prefix.shift, 0) if length else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None:
            self.keys, self.values = self.keys[indices.to(self.keys.device)], self.values[indices.to(self.keys.device)]
        if self._leads:
            self.prefix.take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = len(self.prefix.mask if self.keys is None else self.keys)  # the first layer has told the prefix already
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length()
        gone = min(-tokens_to_remove, length) if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        if gone:
            self.keys, self.values = self.keys[:, :, :-gone], self.values[:, :, :-gone]
        if self._leads:
            self.prefix.drop_last(gone)

    def put(self, keys: Tensor, values: Tensor, turn: Turn | None) -> None:
        """Exchange the passages for others, turning the keys of the text."""
        if not self.is_initialized:
            if keys.numel():
                self.update(keys, values)
            return
        own_keys, own_values = (part[:, :, self.prefix.size :] for part in (self.keys, self.values))
        own_keys = own_keys if turn is None else turn(own_keys)
        self.keys = torch.cat((keys, own_keys), dim=2) if keys.numel() else own_keys
        self.values = torch.cat((values, own_values), dim=2) if values.numel() else own_values


class StaticWithPassages(StaticLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache of a fixed size, in which passages take the first positions."""

    keys: Any
    values: Any

    def __init__(self, prefix: Prefix, most: int) -> None:
        super().__init__(most + prefix.size)
        self.prefix = prefix

    def get_seq_length(self) -> Any:
        length = super().get_seq_length()
        return length - self.prefix.shift if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len - self.prefix.shift, 0

    def put(self, keys: Tensor, values: Tensor, turn: Turn | None) -> None:
        """Exchange the passages for others, where they lie, turning the keys of the text."""
        size = self.prefix.size
        padding = (0, 0, size - keys.shape[2], 0)
        keys, values = F.pad(keys, padding), F.pad(values, padding)
        if not self.is_initialized or self.cumulative_length == 0:
            self.update(keys, values)
            return
        self.keys[:, :, :size], self.values[:, :, :size] = keys, values
        if turn is not None:
            self.keys[:, :, size:] = turn(self.keys[:, :, size:])


WithPassages = DynamicWithPassages | StaticWithPassages
GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
FIXED = (StaticLayer, StaticSliding)


def prefix_of(cache: Any) -> Prefix | None:
    """What stands before the text in a cache, if it has not been reset since."""
    layers = getattr(cache, "layers", None)
    if not layers or not isinstance(layers[0], WithPassages):
        return None
    held = layers[0].is_initialized and (not isinstance(layers[0], StaticLayer) or layers[0].cumulative_length > 0)
    return layers[0].prefix if held else None


def can_begin(cache: Any) -> bool:
    """Whether passages can be placed before what a cache holds: if it holds nothing, or all of a text."""
    if cache is None or not cache.get_seq_length():
        return True
    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", ()))


def check(cache: Any, mask: Any) -> None:
    """Raises ValueError for a cache in which passages cannot be placed, and for masks that cannot be extended."""
    for each in mask.values() if isinstance(mask, dict) else [mask]:
        if each is not None and (not isinstance(each, Tensor) or each.ndim not in (2, 4)):
            raise ValueError(
                f"passages need an attention mask as a tensor (rows, tokens), got {type(each).__name__}: "
                "with flex attention use a cache that grows"
            )
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    kinds = {type(layer) for layer in layers or ()} - {*GROWING, *FIXED, DynamicWithPassages, StaticWithPassages}
    if layers is None or kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or type(cache).__name__
        raise ValueError(
            f"passages cannot be placed in a cache of {names}: use a DynamicCache or a StaticCache, "
            "or call the model inside memory.enabled(False)"
        )


def wrap(cache: Any, count: int, mask: Tensor, budget: int) -> Prefix:
    """Let so many layers of a cache stand behind passages, of which there are none yet."""
    if not (cache.layers and isinstance(cache.layers[0], StaticLayer)):
        prefix = Prefix(mask[:, :0])
        layers: list[WithPassages] = [DynamicWithPassages(prefix, leads=i == 0) for i in range(count)]
        for new, old in zip(layers, cache.layers, strict=False):
            if old.is_initialized and old.get_seq_length():
                new.update(old.keys, old.values)
                prefix.has_text = True
        cache.layers[:] = layers
        return prefix
    known = cache.layers[0]
    if isinstance(known, StaticWithPassages) and known.prefix.size == budget:  # reset, and used again where it lies
        known.prefix.begin(mask.new_zeros((len(mask), budget)))
        return known.prefix
    prefix, most = Prefix(mask.new_zeros((len(mask), budget))), _longest(cache)
    cache.layers[:] = [StaticWithPassages(prefix, most) for _ in range(count)]
    return prefix


def _longest(cache: Any) -> int:
    """How many tokens of a text a cache of a fixed size holds, in the layers that see all of it."""
    lengths: list[int] = [
        layer.max_cache_len - (layer.prefix.size if isinstance(layer, StaticWithPassages) else 0)
        for layer in cache.layers
    ]
    return max(lengths)


def put(cache: Any, prefix: Prefix, pairs: Sequence[Pairs], mask: Tensor, turned: Turned | None) -> None:
    """Exchange the passages in a cache for others, (B, P) of which are no padding. Where they take more or fewer
    positions than the ones before, the text after them is moved; turned: None if it cannot be."""
    starts = mask.sum(dim=1) if turned is not None or not prefix.has_text else prefix.starts
    by = starts - prefix.starts
    moves = prefix.has_text and bool(by.any())
    for i, (layer, (keys, values)) in enumerate(zip(cache.layers, pairs, strict=True)):
        layer.put(keys, values, functools.partial(turned, i, by=by) if moves and turned is not None else None)
    size = prefix.size if isinstance(cache.layers[0], StaticLayer) else mask.shape[1]
    prefix.exchange(F.pad(mask, (size - mask.shape[1], 0)), starts)


def taken(cache: Any, count: int, places: Tensor) -> tuple[list[Pairs], Tensor]:
    """The keys and values of the first tokens of the text in each layer, and at which positions they stand (B, T).

    places: (B, T), at which places of the text.
    """
    prefix = cache.layers[0].prefix
    some = slice(prefix.size, prefix.size + count)
    shift = (prefix.starts - prefix.gone)[:, None]
    return [(layer.keys[:, :, some], layer.values[:, :, some]) for layer in cache.layers], places.to(
        shift.device
    ) + shift


def drop(cache: Any, count: int, gone: Tensor, turned: Turned) -> None:
    """Let the first tokens of the text leave a cache; what is left moves to the positions at which they stood.

    gone: (B,), how many positions have left in all.
    """
    prefix = cache.layers[0].prefix
    by = prefix.gone - gone.to(prefix.gone.device)
    for i, layer in enumerate(cache.layers):
        keys = turned(i, layer.keys[:, :, prefix.size + count :], by=by)
        layer.keys = torch.cat((layer.keys[:, :, : prefix.size], keys), dim=2)
        layer.values = torch.cat((layer.values[:, :, : prefix.size], layer.values[:, :, prefix.size + count :]), dim=2)
    prefix.dropped, prefix.gone, prefix.is_due = prefix.dropped + count, prefix.gone - by, True


def new_cache() -> Any:
    """An empty cache that grows, and keeps all of the text in every layer."""
    return DynamicCache()


def extend(
    given: dict[str, Any], prefix: Prefix, before: int, shape: tuple[int, int], *, takes: bool, hidden: bool
) -> None:
    """Extend the arguments of a call, of which `before` tokens of the text have passed, by the passages.

    takes: whether what is called takes `position_ids`. hidden: whether the passages shall not be seen.
    """
    batch, count = shape
    if takes:
        places = given.get("position_ids")
        if places is None:
            places = torch.arange(before, before + count, device=prefix.starts.device)[None].expand(batch, count)
        shift = (prefix.starts - prefix.gone).to(places.device)
        given["position_ids"] = places + (shift[:, None] if places.ndim == 2 else shift[None, :, None])
    if isinstance(given.get("cache_position"), Tensor):
        given["cache_position"] = given["cache_position"] + prefix.size - prefix.dropped
    mask = given.get("attention_mask")
    seen = torch.zeros_like(prefix.mask) if hidden else prefix.mask
    if isinstance(mask, dict):
        given["attention_mask"] = {name: _extended(each, seen, prefix.dropped) for name, each in mask.items()}
    elif mask is not None:
        given["attention_mask"] = _extended(mask, seen, prefix.dropped)
    elif hidden or not prefix.is_full:
        rest = seen.new_ones((batch, before - prefix.dropped + count))
        given["attention_mask"] = torch.cat((seen, rest), dim=1).long()


def _extended(mask: Any, seen: Tensor, dropped: int) -> Any:
    """(B, S + T), or (B, 1, T, S + T) for each query, by P columns of passages."""
    if mask is None:
        return None
    seen = seen.to(mask.device)
    if mask.ndim == 2:
        return torch.cat((seen.to(mask.dtype), mask[:, dropped:]), dim=1)
    seen = seen[:, None, None, :].expand(len(mask), mask.shape[1], mask.shape[2], -1)
    if mask.dtype != torch.bool:
        seen = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~seen, torch.finfo(mask.dtype).min
        )
    return torch.cat((seen, mask), dim=-1)
