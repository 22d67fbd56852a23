"""Attaching a memory of spans to a causal language model of transformers: which layers, which finder."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from memorizing_transformers_pytorch.huggingface import prefix as prefixes
from memorizing_transformers_pytorch.huggingface.calls import Shared, State
from memorizing_transformers_pytorch.huggingface.finder import Finder, Head, best_head
from memorizing_transformers_pytorch.huggingface.interface import BACKENDS
from memorizing_transformers_pytorch.huggingface.models import check_model, evaluating, positions_of, run, vocabulary_of
from memorizing_transformers_pytorch.huggingface.probe import TOKENS, Layer, probe
from memorizing_transformers_pytorch.huggingface.recall import Recall
from memorizing_transformers_pytorch.huggingface.recalling import RecallMemory
from memorizing_transformers_pytorch.huggingface.searching import Search
from memorizing_transformers_pytorch.huggingface.span_layer import SpanOptions, span_layers
from memorizing_transformers_pytorch.memory.ledger import Ledger


def attach_spans(model: Any, options: dict[str, Any], tokenizer: Any) -> RecallMemory:
    """See `attach_memory`. options: as it is given them; None stands for what is usual."""
    check_model(model)
    with _examinable(model):
        served, refused = _served(model)
        head = best_head(model, served) if served and options["finder"] != "bm25" else None
    layers = _with_cache(model, served)
    reason = _why_not_kv(layers, refused)
    content = options["content"] or "tokens"
    if content == "kv" and reason is not None:
        raise ValueError(f"keys and values of this model cannot be moved ({reason}): use content='tokens'")
    if options["window"] is not None and any(layer is None or layer.embedded for layer in layers.values()):
        raise ValueError("write='window' needs a model whose keys can be moved to other positions: use write='read'")
    name = _finder_name(options["finder"], head, grows=options["write"] == "window")
    checked = SpanOptions(**options | {"content": content, "finder": name})
    _check_positions(model, checked, layers)
    shared = Shared(model, State({}, Ledger(), []))
    finder = None if head is None else Finder(served[head.layer], head, shared)
    known = {i: layer for i, layer in layers.items() if layer is not None}
    made = span_layers(known, finder, _first_layer(model), checked, shared)
    recall = Recall(model, Search(model, shared, checked, finder, layers, tokenizer), checked)
    return RecallMemory(model, made, shared, checked, recall, tokenizer)


def _first_layer(model: nn.Module) -> nn.Module:
    """The first layer of a model, by which its calls are noticed where nothing is known of its attention."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(f"{type(model).__name__} cannot have a memory: it has no list of layers")
    return lists[0][0]


@contextlib.contextmanager
def _examinable(model: Any) -> Iterator[None]:
    """Inside, the model attends with a backend whose masks are understood here. (Passages leave attention alone, and so
    serve any.)"""
    name = model.config._attn_implementation
    if name in BACKENDS:
        yield
        return
    model.set_attn_implementation(BACKENDS[0])
    try:
        yield
    finally:
        model.set_attn_implementation(name)


def _served(model: Any) -> tuple[dict[int, Layer], dict[int, str]]:
    """As `probe`, but without an error if no layer can be examined: then no layer is served, and the reason is that of
    layer -1."""
    try:
        return probe(model)
    except ValueError as error:
        return {}, {-1: str(error)}


def _with_cache(model: Any, served: dict[int, Layer]) -> dict[int, Layer | None]:
    """The layers that keep keys and values in a cache, and what is known of them. Raises ValueError for a model that
    keeps anything else there."""
    cache = prefixes.new_cache()
    try:
        with evaluating(model):
            run(model, torch.arange(TOKENS) % vocabulary_of(model), cache=cache)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot have a memory: with a cache it raised {error}") from error
    kinds = {type(layer).__name__ for layer in cache.layers if type(layer) not in prefixes.GROWING}
    lengths = {layer.get_seq_length() for layer in cache.layers}
    if kinds or lengths != {TOKENS}:
        what = ", ".join(sorted(kinds)) or "none of the tokens in some layers"
        raise ValueError(
            f"{type(model).__name__} cannot have a memory: passages stand in the cache of keys and values, "
            f"and that of this model holds {what}"
        )
    return {i: served.get(i) for i in range(len(cache.layers))}


def _why_not_kv(layers: dict[int, Layer | None], refused: dict[int, str]) -> str | None:
    """Why stored keys and values of a layer cannot be moved to other positions; None if they can."""
    for number, layer in layers.items():
        if layer is None:
            return refused.get(number, refused.get(-1, f"nothing is known of layer {number}"))
        if layer.embedded:
            return "positions come with the embeddings of its tokens"
    return None


def _finder_name(wanted: str | None, head: Head | None, *, grows: bool) -> str:
    """grows: whether the memory changes while the model writes, so that words would be indexed again and again.

    Raises ValueError for a head where there is none, and for BM25 without the library."""
    if head is None and wanted in ("head", "both"):
        raise ValueError("this model has no induction head that could find passages: use finder='bm25'")
    has_words = importlib.util.find_spec("bm25s") is not None
    name = wanted or ("bm25" if head is None else "both" if has_words and not grows else "head")
    if wanted is None and head is None:
        warnings.warn("this model has no induction head that could find passages: finder='bm25' is used", stacklevel=4)
    if name in ("bm25", "both") and not has_words:
        raise ValueError("finder='bm25' needs the library bm25s: pip install bm25s")
    return name


def _check_positions(model: Any, options: SpanOptions, layers: dict[int, Layer | None]) -> None:
    """Raises ValueError where passages and pieces do not fit the positions that a model has learned."""
    most = positions_of(model)
    if (
        most is not None
        and max(options.budget, options.chunk) > most // 2
        and any(layer is None or layer.embedded for layer in layers.values())
    ):
        raise ValueError(
            f"passages of {options.budget} positions and pieces of {options.chunk} do not fit this model, which has "
            f"{most}: give fewer passages, a shorter span, or a shorter chunk"
        )
