"""Attaching a memory to a causal language model of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from memorizing_transformers_pytorch.huggingface import interface
from memorizing_transformers_pytorch.huggingface.attach_spans import attach_spans
from memorizing_transformers_pytorch.huggingface.attached import AttachedMemory
from memorizing_transformers_pytorch.huggingface.calls import Shared, State
from memorizing_transformers_pytorch.huggingface.hooks import Hooks
from memorizing_transformers_pytorch.huggingface.layer import BaseLayer, Options
from memorizing_transformers_pytorch.huggingface.layers import chosen_layers
from memorizing_transformers_pytorch.huggingface.memory_layer import MemoryLayer
from memorizing_transformers_pytorch.huggingface.models import positions_of
from memorizing_transformers_pytorch.huggingface.probe import Layer, probe
from memorizing_transformers_pytorch.memory.ledger import Ledger
from memorizing_transformers_pytorch.memory.policy import OLDEST

OPTIONS = {
    "spans": ("content", "finder", "passages", "span", "first", "every", "overlap"),
    "tokens": ("layers", "topk", "combine", "positions", "distance", "recent", "skip_first"),
}
"""Those that one kind of memory has alone."""
COMMON = ("max_memories", "chunk", "write", "window", "dtype", "device", "index", "policy", "directory")


def attach_memory(
    model: Any,
    *,
    retrieve: str = "spans",
    tokenizer: Any = None,
    content: str | None = None,
    finder: str | None = None,
    passages: int = 1,
    span: int = 80,
    first: int = 4,
    every: int = 128,
    overlap: int = 64,
    layers: str | Iterable[int] = "auto",
    topk: int = 32,
    combine: str = "softmax",
    positions: str = "true",
    distance: int = 1_024,
    recent: int | None = None,
    skip_first: int = 4,
    max_memories: int = 262_144,
    chunk: int = 512,
    write: str = "read",
    window: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    index: str = "auto",
    policy: str = OLDEST,
    directory: str | Path | None = None,
) -> AttachedMemory:
    """Give a causal language model of transformers a memory of what it reads.

    With nothing read the model gives bit for bit what it gave before.

    retrieve: "spans", passages of what was read stand before a text, in its cache; or "tokens", as in the paper, some
        layers attend to single remembered tokens, which can be trained.
    tokenizer: for a memory that takes and gives text.
    max_memories: how many tokens each row remembers; when it is full, the newest replaces the oldest.
    chunk: how many tokens `read` gives the model at once.
    write: "read", only what is given to `read` is remembered; or "window", also what leaves the cache while the model
        writes, which then keeps the last `window` tokens: so that a chat can go on for ever. A chat keeps its cache
        (`past_key_values`) from call to call.
    dtype, device, index, directory: of the memory, as for `KNNMemory`. dtype is that of the model unless given;
        torch.int8 takes little more than a quarter of float32. device is that of the model for tokens, and the CPU for
        spans. Spans are found by comparing all, whatever the index.
    policy: which entries are evicted when the memory is full, as for `KNNMemory`. With retrieve="tokens",
        it applies to entries older than `recent`.

    With retrieve="spans":

    content: what is kept of each token. "tokens", the key of the finder alone, and passages are read again when they
        are recalled; or "kv", the keys and values of all layers, for a model whose keys can be moved. "tokens" unless
        given.
    finder: what finds passages by the last tokens of a text. "head", the best induction head of the model; "bm25", the
        words (needs the library bm25s); or "both". Unless given "both"; "head" with write="window", since words are
        indexed anew when the memory has changed, and "bm25" for a model without an induction head.
    passages, span: how many tokens stand before a text: so many passages of so many tokens, around the places that
        were found. first: so many tokens of the beginning of the best passage's document come before them.
    every: after how many tokens passages are chosen anew.
    overlap: how many tokens at the beginning of each chunk are read again, so that no token is read without any before
        it.

    With retrieve="tokens", for a model that attends through the attention interface, with "sdpa" or "eager":

    layers: numbers of layers, "all" that can, or "auto": those with induction heads (see `suggest_layers`).
    topk: how many entries each query retrieves; of old ones (see `positions`) as many again.
    combine: "softmax", one softmax over local keys and retrieved ones, with a bias per head that starts at 0; or
        "gate", the paper's learned gate per head.
    positions: "true", remembered tokens are as far away as they are, the last `recent` of them (half of the longest
        context that the model was made for, unless given), and older ones all `distance` away; or "constant", all of
        them. Of more entries than that longest context, each weighs less: by the logarithm of how many times more
        there are.
    skip_first: how many tokens at the beginning of each chunk are not remembered, as they attract attention whatever
        they are; chunks overlap by as many.

    Raises ValueError, with the model untouched, for a model that cannot have such a memory, and says why; and for
    options of the other kind of memory.
    """
    given = dict(locals())
    del given["model"]
    if retrieve not in OPTIONS:
        raise ValueError(f"retrieve must be one of {tuple(OPTIONS)}, got {retrieve!r}")
    _refuse_others(retrieve, given)
    common = {name: given[name] for name in COMMON}
    own = {name: given[name] for name in OPTIONS[retrieve]}
    with torch.inference_mode(False):  # what is made here outlives it
        if retrieve == "spans":
            return attach_spans(model, common | own, tokenizer)
        del own["layers"]
        return _attach(model, layers, Options(**common, **own), tokenizer)


def _refuse_others(retrieve: str, given: dict[str, Any]) -> None:
    """Raises ValueError for options that mean nothing to this kind of memory."""
    usual = {name: each.default for name, each in inspect.signature(attach_memory).parameters.items()}
    for kind, names in OPTIONS.items():
        others = [name for name in names if kind != retrieve and given[name] != usual[name]]
        if others:
            raise ValueError(f"{', '.join(others)}: only for retrieve={kind!r}, got retrieve={retrieve!r}")


def _attach(model: Any, layers: str | Iterable[int], options: Options, tokenizer: Any) -> AttachedMemory:
    served, refused = probe(model)
    _check_chunk(model, served, options.chunk)
    numbers = _numbers(model, layers, served, refused)
    for number in numbers:
        interface.backend_of(served[number].module, served[number].module.config)
    shared = Shared(model, State({}, Ledger(), []))
    made: list[BaseLayer] = [MemoryLayer(served[number], options, shared, positions_of(model)) for number in numbers]
    return AttachedMemory(model, made, shared, options, tokenizer=tokenizer)


def _check_chunk(model: Any, served: dict[int, Layer], chunk: int) -> None:
    """Raises ValueError for chunks that are longer than the positions that the model has learned."""
    most = positions_of(model)
    if most is not None and chunk > most and any(layer.embedded for layer in served.values()):
        raise ValueError(f"expected chunk to be at most {most}, the positions that the model has, got {chunk}")


def _numbers(model: Any, layers: str | Iterable[int], served: dict[int, Layer], refused: dict[int, str]) -> list[int]:
    if layers == "auto":
        return chosen_layers(model, served)
    if layers == "all":
        return sorted(served)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f"expected layers to be numbers, 'all' or 'auto', got {layers!r}")
    numbers = sorted(set(layers))
    for number in numbers:
        if number not in served:
            reason = f": {refused[number]}" if number in refused else ""
            raise ValueError(f"expected layers among {sorted(served)}, got {number}{reason}")
    if not numbers:
        raise ValueError("expected at least one layer, got none")
    return numbers


def memory_of(model: Any) -> AttachedMemory:
    """The memory that is attached to a model: of a copy, say, or of a model that `torch.load` has read.

    Raises ValueError for a model without one.
    """
    for hook in model._forward_pre_hooks.values():
        hooks = getattr(hook, "__self__", None)
        if isinstance(hooks, Hooks):
            return hooks.begin.__self__.handle  # type: ignore[attr-defined,no-any-return]
    raise ValueError(f"no memory is attached to this {type(model).__name__}: use attach_memory()")
