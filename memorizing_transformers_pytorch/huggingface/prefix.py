"""Passages in a cache: they stand before the text, and whoever holds the cache sees only the text.

A cache of transformers has a layer object for each layer of the model. `wrap` replaces these with ones that begin with
the keys and values of passages, and `put` fills these in. During a call of the model the cache is as long as it is;
before and after, its length is that of the text alone, so that `generate` and its callers count as they do without a
memory.

Shapes: B rows, G key/value heads, P positions of passages, S positions of the text in the cache, T tokens of a call,
D head width.
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

from memorizing_transformers_pytorch.huggingface.cache_layers import DynamicWithPassages, Prefix, StaticWithPassages

Pairs = tuple[Tensor, Tensor]
"""Keys and values (B, G, P, D) of a layer, turned to positions 0 ... P - 1 of each row."""
Turned = Callable[..., Tensor]
"""Turns keys (B, G, T, D) of the i-th layer by so many positions (B,)."""


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
    """Replace the layers of a cache with `count` layers that can begin with passages. There are none yet."""
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
    """Replace the passages in a cache. mask: (B, P), False for padding. If the new ones take more or fewer positions,
    the text after them moves. turned: None if the text cannot move."""
    starts = mask.sum(dim=1) if turned is not None or not prefix.has_text else prefix.starts
    by = starts - prefix.starts
    moves = prefix.has_text and bool(by.any())
    for i, (layer, (keys, values)) in enumerate(zip(cache.layers, pairs, strict=True)):
        layer.put(keys, values, functools.partial(turned, i, by=by) if moves and turned is not None else None)
    size = prefix.size if isinstance(cache.layers[0], StaticLayer) else mask.shape[1]
    prefix.exchange(F.pad(mask, (size - mask.shape[1], 0)), starts)


def taken(cache: Any, count: int, places: Tensor | None) -> tuple[list[Pairs], Tensor]:
    """The keys and values of the first tokens of the text in each layer, and at which positions they stand (B, T).

    places: (B, T), at which places of the text; None for its first ones.
    """
    prefix, first = prefix_of(cache), cache.layers[0].keys
    places = (torch.arange(count)[None].expand(len(first), count) if places is None else places).to(first.device)
    size = 0 if prefix is None else prefix.size
    if prefix is not None:
        places = places + (prefix.starts - prefix.gone).to(first.device)[:, None]
    return [
        (layer.keys[:, :, size:][:, :, :count], layer.values[:, :, size:][:, :, :count]) for layer in cache.layers
    ], places


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
    """Add the passages to the positions and the mask of a call. before: how many tokens of the text came earlier.

    takes: whether the module takes `position_ids`. hidden: whether to mask the passages.
    """
    batch, count = shape
    if takes:
        places = given.get("position_ids")
        if places is None:
            places = _places(given.get("attention_mask"), before, shape).to(prefix.starts.device)
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


def _places(mask: Any, before: int, shape: tuple[int, int]) -> Tensor:
    """Of the tokens of a call in the text of each row (B, T), which begins after the padding on the left."""
    places = torch.arange(before, before + shape[1])[None].expand(shape)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return places
    padding = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    return (places.to(mask.device) - padding).clamp_min(0)


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
