"""Attaching a memory to a causal language model of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from memorizing_transformers_pytorch.huggingface import interface
from memorizing_transformers_pytorch.huggingface.added import Added, AddedLayer
from memorizing_transformers_pytorch.huggingface.attach_spans import attach_spans
from memorizing_transformers_pytorch.huggingface.attached import AttachedMemory
from memorizing_transformers_pytorch.huggingface.calls import Shared, State
from memorizing_transformers_pytorch.huggingface.hooks import Hooks
from memorizing_transformers_pytorch.huggingface.layer import BaseLayer, Options
from memorizing_transformers_pytorch.huggingface.layers import chosen_layers, induction_scores
from memorizing_transformers_pytorch.huggingface.memory_layer import MemoryLayer
from memorizing_transformers_pytorch.huggingface.models import positions_of
from memorizing_transformers_pytorch.huggingface.probe import Layer, probe
from memorizing_transformers_pytorch.memory.ledger import Ledger
from memorizing_transformers_pytorch.memory.policy import OLDEST


def attach_memory(
    model: Any,
    *,
    retrieve: str = "tokens",
    tokenizer: Any = None,
    content: str | None = None,
    finder: str | None = None,
    passages: int = 4,
    span: int = 80,
    first: int = 4,
    every: int = 64,
    overlap: int = 64,
    layers: str | Iterable[int] = "auto",
    added: bool | Added = False,
    topk: int = 32,
    combine: str = "softmax",
    positions: str = "true",
    distance: int = 1_024,
    recent: int | None = None,
    max_memories: int = 262_144,
    chunk: int = 512,
    skip_first: int = 4,
    write: str = "read",
    window: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    index: str = "auto",
    policy: str = OLDEST,
    directory: str | Path | None = None,
) -> AttachedMemory:
    """Give some layers of a causal language model of transformers a memory, which they read with their own attention.

    model: any that attends through the attention interface, with attn_implementation "sdpa" or "eager".
    tokenizer: the model's own, with which the memory reads text, and gives it.
    layers: numbers of layers, "all" that can, or "auto": those with induction heads (see `suggest_layers`).
    added: instead of giving the layers themselves a memory, add a layer of attention with a memory after each of them,
        which must be trained (see `Added` for its sizes). "auto" adds one, after the best layer.
    topk: how many entries each query retrieves; of old ones (see `positions`) as many again.
    combine: "softmax", one softmax over local keys and retrieved ones, with a bias per head that starts at 0; or
        "gate", the paper's learned gate per head.
    positions: "true", remembered tokens are as far away as they are, the last `recent` of them (half of the longest
        context that the model was made for, unless given), and older ones, for which it knows no distances, all
        `distance` away; or "constant", all of them. Only for rotary position embeddings; other keys are kept as they
        are.
        Of more entries than that longest context, each weighs less: by the logarithm of how many times more there are.
    max_memories: entries of each row and layer; when full, the newest replaces the oldest.
    chunk: how many tokens `read` gives the model at once, and so its local context while reading.
    skip_first: how many tokens at the beginning of each chunk are not remembered, as they attract attention whatever
        they are; chunks overlap by as many.
    write: "read", only what is given to `read` (and `writing`) is remembered; or "window", also what leaves the cache
        while the model writes, which then keeps the last `window` tokens in every layer: so that a chat can go on for
        ever. A chat keeps its cache (`past_key_values`) from call to call.
    policy: what makes room when the memory is full (of entries older than `recent`), as for `KNNMemory`.
    dtype, device, index, directory: of the memory, as for `KNNMemory`; dtype and device are those of the model unless
        said otherwise. dtype=torch.int8 takes little more than a quarter of float32. (Keys that grow old are turned as
        the numbers that they stand for, and become codes once more.)

    Nothing else changes: with nothing read the model gives bit for bit what it gave before.

    Raises ValueError, with the model untouched, for a model or layers that cannot have a memory, and says why.
    """
    kept: dict[str, Any] = {
        "max_memories": max_memories,
        "chunk": chunk,
        "write": write,
        "window": window,
        "dtype": dtype,
        "device": device,
        "index": index,
        "policy": policy,
        "directory": directory,
    }
    if retrieve == "spans":
        chosen = {"content": content, "finder": finder, "passages": passages, "span": span, "first": first}
        with torch.inference_mode(False):
            return attach_spans(model, kept | chosen | {"every": every, "overlap": overlap}, tokenizer)
    options = Options(
        topk=topk,
        combine=combine,
        positions=positions,
        distance=distance,
        recent=recent,
        skip_first=skip_first,
        **kept,
    )
    if not isinstance(added, bool | Added):
        raise ValueError(f"expected added to be True, False or an Added, got {added!r}")
    with torch.inference_mode(False):  # what is made here outlives it
        return _attach(model, layers, added, options, tokenizer)


def _attach(
    model: Any, layers: str | Iterable[int], added: bool | Added, options: Options, tokenizer: Any
) -> AttachedMemory:
    served, refused = probe(model)
    _check_chunk(model, served, options.chunk)
    numbers = _numbers(model, layers, served, refused)
    for number in numbers:
        interface.backend_of(served[number].module, served[number].module.config)
    shared = Shared(model, State({}, Ledger(), []))
    made: list[BaseLayer]
    if added:
        if options.window is not None:
            raise ValueError("expected write='read' with an added layer, got write='window'")
        numbers = list(induction_scores(model, served))[:1] if layers == "auto" else numbers
        made = _added(model, [served[number] for number in numbers], added, options, shared)
    else:
        made = [MemoryLayer(served[number], options, shared, positions_of(model)) for number in numbers]
    return AttachedMemory(model, made, shared, options, tokenizer=tokenizer)


def _check_chunk(model: Any, served: dict[int, Layer], chunk: int) -> None:
    """Raises ValueError for chunks that are longer than the positions that the model has learned."""
    most = positions_of(model)
    if most is not None and chunk > most and any(layer.embedded for layer in served.values()):
        raise ValueError(f"expected chunk to be at most {most}, the positions that the model has, got {chunk}")


def _added(model: Any, layers: list[Layer], added: bool | Added, options: Options, shared: Shared) -> list[BaseLayer]:
    """A layer after each of these."""
    sizes = Added() if isinstance(added, bool) else added
    width = model.config.get_text_config().hidden_size
    names = {module: name for name, module in model.named_modules()}
    whole = [model.get_submodule(names[layer.module].rpartition(".")[0]) for layer in layers]
    return [
        AddedLayer(layer, module, width, sizes, options, shared) for layer, module in zip(layers, whole, strict=True)
    ]


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
