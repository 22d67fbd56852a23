"""Which layers of a model can be given a memory, found out by running a few tokens.

A layer can if it attends through the attention interface once per call, with queries and keys of one width, and its
keys can be moved: they carry no position, or one of rotary embeddings that can be turned back, or one that came with
the embedding of the token.

Shapes: B rows, G key/value heads, T tokens, D head width, V tokens in the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.huggingface.interface import Extension, Local, is_used, leave, use
from memorizing_transformers_pytorch.huggingface.models import check_model, evaluating, positions_of, run, vocabulary_of
from memorizing_transformers_pytorch.huggingface.rotary import Rotary, rotary_of

TOKENS = 6
OFFSETS = (0, 3, 11)
FARTHEST = 4_096  # position at which angles are measured
SAME = 2e-2  # relative error between keys that have been turned back: half-precision models round


@dataclass(frozen=True)
class Layer:
    """A layer that can be given a memory.

    index: its number. module: its attention. heads, kv_heads, width: H, G and D. rotary: how its keys are turned, None
    if they are not. embedded: whether positions came with the embedding of the token (learned ones). device, dtype: of
    the values that it computes; its weights may be packed codes.
    """

    index: int
    module: nn.Module
    heads: int
    kv_heads: int
    width: int
    rotary: Rotary | None
    embedded: bool
    device: torch.device
    dtype: torch.dtype


@dataclass
class Probed(Extension):
    """What passes through a layer."""

    calls: int = 0
    out: Tensor | None = None
    query: Tensor | None = None
    local: Local | None = None
    position_embeddings: Any = None
    hidden: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    cos_sin: list[Any] = field(default_factory=list)

    def joined(self, module: nn.Module, out: Tensor, query: Tensor, local: Local) -> Tensor:
        self.calls += 1
        self.out, self.query, self.local = out, query, local
        return out

    def with_first_input(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The same input at every offset, where only cosines and sines should tell them apart: what the layers before
        have rounded would otherwise add up, and in half precision look like another position. None if it is not so."""
        if not self.inputs or self.position_embeddings is None:
            return None
        first = self.inputs[0]
        return ((first, *inputs[1:]), options) if inputs else (inputs, options | {"hidden_states": first})


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules by number of the layer: what has `layer_idx`, a configuration and projections of its own.

    Raises ValueError where a layer has several (encoder-decoder models).
    """
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        index, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
        attends = "Attention" in type(module).__name__ and hasattr(config, "_attn_implementation")
        if not attends or not isinstance(index, int):
            continue
        if index in found:
            raise ValueError(f"expected one attention per layer, got {name} and another one in layer {index}")
        found[index] = module
    return found


def probe(model: Any) -> tuple[dict[int, Layer], dict[int, str]]:
    """Which layers can have a memory, and for the others why not.

    Raises ValueError for models of which none can.
    """
    with refusing(model):
        return _probe(model, _candidates(model))


@contextlib.contextmanager
def refusing(model: Any) -> Iterator[None]:
    """Raises ValueError for whatever is raised inside: a model that cannot be examined cannot have a memory."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        reason = f"examining it raised {type(error).__name__}: {error}"
        raise ValueError(f"{_name(model)} cannot have a memory: {reason}") from error


def _probe(model: Any, modules: dict[int, nn.Module]) -> tuple[dict[int, Layer], dict[int, str]]:
    tokens = torch.arange(TOKENS) % vocabulary_of(model)
    with watching(model, modules) as seen:
        for offset in OFFSETS:
            try:
                run(model, tokens, offset)
            except Exception as error:
                expected = f"expected a model that can be given {TOKENS} tokens from position {offset} on"
                raise ValueError(f"{expected}, got {_name(model)}, which cannot: {error}") from error
            for layer in seen.values():
                if layer.local is not None and layer.hidden is not None:
                    layer.keys.append(layer.local.key)
                    layer.inputs.append(layer.hidden)
                    layer.cos_sin.append(layer.position_embeddings)
    served, refused = {}, {}
    for index, module in modules.items():
        try:
            served[index] = _layer(index, module, seen[index])
        except ValueError as error:
            refused[index] = str(error)
    if not served:
        reasons = "; ".join(sorted(set(refused.values())))
        raise ValueError(f"expected a model with layers that can have a memory, got {_name(model)}: {reasons}")
    return _refined(model, served), refused


def _refined(model: Any, served: dict[int, Layer]) -> dict[int, Layer]:
    """With angles that are precise, for models that round cosines and sines to half precision."""
    turned = {index: layer.module for index, layer in served.items() if layer.rotary is not None}
    scaling = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    known = (positions_of(model), scaling.get("original_max_position_embeddings"))
    most = min([each for each in known if each], default=FARTHEST)
    served, rounded = dict(served), set(turned)
    with watching(model, turned) as seen:
        for place in (2**power for power in range(1, FARTHEST.bit_length()) if rounded and 2**power < most):
            run(model, torch.zeros(1, dtype=torch.int64), place)
            for index in list(rounded):
                rotary, cos_sin = served[index].rotary, seen[index].position_embeddings
                if rotary is None or cos_sin[0].dtype == torch.float32:
                    rounded.remove(index)  # precise as it is: without others the model need not run again
                else:
                    served[index] = replace(served[index], rotary=rotary.refined(cos_sin, place))
    return served


def _candidates(model: Any) -> dict[int, nn.Module]:
    name = _name(model)
    check_model(model)
    if not type(model)._can_set_attn_implementation():
        raise ValueError(f"expected a model that attends through the attention interface of transformers, got {name}")
    modules = attention_modules(model)
    if not modules:
        raise ValueError(f"expected a model with attention layers, got {name}, in which none was found")
    if any(is_used(module) for module in modules.values()):
        raise ValueError(f"expected a model without a memory, got {name}, which has one: detach() it first")
    return modules


@contextlib.contextmanager
def watching(model: nn.Module, modules: dict[int, nn.Module]) -> Iterator[dict[int, Probed]]:
    """Inside, what passes through these layers is kept; gradients, dropout and what is cached are off."""
    seen, hooks = {index: Probed() for index in modules}, []
    try:
        for index, module in modules.items():
            use(module, seen[index])

            def remember(_module: nn.Module, inputs: Any, options: dict[str, Any], layer: Probed = seen[index]) -> Any:
                layer.hidden = inputs[0] if inputs else options.get("hidden_states")
                layer.position_embeddings = options.get("position_embeddings")
                return layer.with_first_input(inputs, options)

            hooks.append(module.register_forward_pre_hook(remember, with_kwargs=True))
        with evaluating(model):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules.values():
            leave(module)


def _layer(index: int, module: nn.Module, seen: Probed) -> Layer:
    """Raises ValueError that says why this layer cannot have a memory."""
    if seen.calls == 0 or seen.local is None or seen.query is None:
        raise ValueError("it does not attend through the attention interface")
    if seen.calls != len(OFFSETS):
        raise ValueError(f"it attends {seen.calls // len(OFFSETS)} times in each call")
    (_, heads, count, width), key, value = seen.query.shape, seen.local.key, seen.local.value
    if key.shape[2] != count or key.shape[2] != value.shape[2]:
        raise ValueError("its keys are not those of the tokens it is given")
    if key.shape[-1] != width or value.shape[-1] != width or heads % key.shape[1]:
        raise ValueError(f"its queries, keys and values have widths {width}, {key.shape[-1]} and {value.shape[-1]}")
    if not _same(seen.out.float(), _with_half_in_memory(seen.query, seen.local)):  # type: ignore[union-attr]
        raise ValueError("its attention is more than a softmax over scaled products of queries and keys")
    embedded = seen.cos_sin[0] is None and not all(_same(seen.inputs[0], other) for other in seen.inputs[1:])
    rotary = None if embedded else _rotary(module, seen)
    return Layer(index, module, heads, key.shape[1], width, rotary, embedded, value.device, value.dtype)


def _with_half_in_memory(query: Tensor, local: Local) -> Tensor:
    """What the layer would give (B, T, H, D) if the later half of the tokens found the others in a memory."""
    count, half = query.shape[2], query.shape[2] // 2
    logits = local.masked(query, slice(0, count), count)
    bare = local.products(query[:, :, half:])[..., :half]
    logits[:, :, half:, :half] = local.logits(bare)
    weights = logits.softmax(dim=-1)[..., :count]
    values = local.value.float().repeat_interleave(query.shape[1] // local.value.shape[1], dim=1)
    return (weights @ values).transpose(1, 2)


def _rotary(module: nn.Module, seen: Probed) -> Rotary | None:
    """How the keys are turned, None if they are not. Raises ValueError for a way that is not known."""
    first, *others = seen.keys
    if all(_same(first, other) for other in others):
        return None
    rotary = rotary_of(module, seen.cos_sin[0], first.shape[-1])
    if rotary is not None:
        keys = [rotary.unturned(key, cos_sin) for key, cos_sin in zip(seen.keys, seen.cos_sin, strict=True)]
        on = rotary.turned(seen.keys[0], torch.tensor([[OFFSETS[-1]]]))
        if all(_same(keys[0], other) for other in keys[1:]) and _same(on, seen.keys[-1].float()):
            return rotary
    raise ValueError("its keys carry positions in a way that cannot be undone")


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= SAME * one.norm())


def _name(model: Any) -> str:
    return type(model).__name__
