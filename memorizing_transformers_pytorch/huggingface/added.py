"""An attention layer added to a model, with a memory of its own: for models whose own layers make little use of one.

After a layer of the model stands a `KNNAttention` with an output gate that starts at 0, so that the model is at first
what it was, and a start as an induction head. It attends to the text as the model does, and to its memory.

Shapes: B rows, T tokens of a call, S tokens with those before them in the cache, G key/value heads, D head width, E
model width, W width of the convolution, C its channels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from memorizing_transformers_pytorch.attention.knn_attention import KNNAttention
from memorizing_transformers_pytorch.huggingface.calls import Call, Shared
from memorizing_transformers_pytorch.huggingface.layer import BaseLayer, Options, Shape, parameters_in_use
from memorizing_transformers_pytorch.huggingface.probe import ADDED, Layer


@dataclass(frozen=True, kw_only=True)
class Added:
    """The sizes of an added layer, as of `KNNAttention`."""

    heads: int = 8
    dim_head: int = 64
    num_kv_heads: int = 1
    short_conv: int = 4


class AddedAttention(nn.Module):
    """What is added: a norm and the attention."""

    def __init__(self, width: int, sizes: Added, topk: int, combine: str) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = KNNAttention(
            dim=width,
            **asdict(sizes),
            num_retrieved_memories=topk,
            combine=combine,
            gate_output=True,
            qk_init="induction" if sizes.short_conv > 1 else "independent",
        )


class AddedLayer(BaseLayer):
    """A layer of attention with a memory, after one of the layers of the model.

    module: that layer. width: E.
    """

    def __init__(
        self, layer: Layer, module: nn.Module, width: int, sizes: Added, options: Options, shared: Shared
    ) -> None:
        shape = Shape(sizes.num_kv_heads, sizes.dim_head, layer.device, layer.dtype)
        super().__init__(layer.index, module, shape, options, shared)
        self._sizes = sizes
        self._added = AddedAttention(width, sizes, options.topk, options.combine).to(layer.device, layer.dtype)
        self._hook: Any = None

    def attach(self) -> None:
        self.module.add_module(ADDED, self._added)
        self._hook = self.module.register_forward_hook(self._after)

    def detach(self) -> None:
        self._hook.remove()
        delattr(self.module, ADDED)

    def parameters(self) -> list[nn.Parameter]:
        return parameters_in_use(self.module.get_submodule(ADDED))

    def _after(self, module: nn.Module, _inputs: Any, out: Any) -> Any:
        """A forward hook: hidden states (B, T, E), alone or first in a tuple, get what the added layer gives."""
        attend: Any = self._attend
        if torch.compiler.is_compiling():  # a search cannot be compiled
            attend = torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        more = attend(module.get_submodule(ADDED), hidden)
        if more is None:
            return out
        hidden = hidden + more
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def _attend(self, added: Any, hidden: Tensor) -> Tensor | None:
        """(B, T, E); None where the memory is switched off."""
        call = self.running_call()
        if call is None or (not call.enabled and not call.keeps_pairs):
            return None
        state = self._state(call)
        past, conv_state = (None, None) if state is None else self._past(state)
        seen, found = call.seen.to(hidden.device), self.found(call)
        attended = added.attention.attend(
            added.norm(hidden),
            bias=_bias(seen, hidden),
            past=past,
            look_up=None if found.is_empty else lambda queries, topk: self.look_up(call, [queries], topk)[0][1],
            conv_state=conv_state,
            documents=(~seen[:, -hidden.shape[1] :]).long(),
        )
        if call.keeps_weights and attended.reading is not None:
            found.weights = attended.reading.weights
        if call.keeps_pairs:
            call.pairs.setdefault(self.index, (attended.pairs[..., 0, :].detach(), attended.pairs[..., 1, :].detach()))
        if state is not None:
            inputs = hidden[..., :1] if attended.conv_inputs is None else attended.conv_inputs
            inputs = inputs * seen[:, -hidden.shape[1] :, None]
            state.update(inputs.unsqueeze(1), attended.pairs.transpose(1, 2).flatten(2).unsqueeze(1))
        out: Tensor = attended.out
        return out if call.enabled else None

    def check(self, call: Call) -> None:
        """Raises ValueError for a cache that has no place for this layer."""
        cache = call.cache
        if cache is None or (not call.enabled and not call.keeps_pairs):
            return
        if not isinstance(cache, DynamicCache):
            got = type(cache).__name__
            raise ValueError(f"expected a DynamicCache (the default of generate) with an added layer, got {got}")
        if cache.layer_class_to_replicate is not None or (call.before and not hasattr(cache, "_memorizing")):
            expected = "past_key_values=DynamicCache(config=model.config) from the first call on"
            raise ValueError(f"expected {expected} with an added layer, got a cache without a place for it")

    def _state(self, call: Call) -> Any:
        """What the cache keeps for this layer (None without one): one more than the model has.

        Its keys are what went into the convolution (B, 1, S, C), its values the pairs (B, 1, S, G * 2 * D).
        """
        cache = call.cache
        if cache is None:
            return None
        number = cache.__dict__.setdefault("_memorizing", {}).setdefault(self.index, len(cache.layers))
        if number == len(cache.layers):
            cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
        return cache.layers[number]

    def _past(self, state: Any) -> tuple[Tensor | None, Tensor | None]:
        """Pairs (B, G, P, 2, D) and inputs of the convolution (B, W - 1, C) of the tokens before."""
        if not state.is_initialized or state.keys.numel() == 0:
            return None, None
        pairs = state.values[:, 0].unflatten(-1, (self._sizes.num_kv_heads, 2, self._sizes.dim_head)).transpose(1, 2)
        kept = max(self._sizes.short_conv - 1, 0)
        inputs = state.keys[:, 0]
        return pairs, nn.functional.pad(inputs, (0, 0, kept, 0))[:, inputs.shape[1] :]


def _bias(seen: Tensor, hidden: Tensor) -> Tensor:
    """(B, 1, T, S): -inf for tokens ahead and padding, but no query is left without any."""
    size, count = seen.shape[1], hidden.shape[1]
    places = torch.arange(size, device=hidden.device)
    own = places[size - count :, None]
    visible = (places <= own) & (seen[:, None, :] | (places == own))
    return torch.zeros(visible.shape, device=hidden.device).masked_fill(~visible, -torch.inf).unsqueeze(1)
