"""The head that finds a passage again: the best induction head of the model (Olsson et al. 2022).

Such a head attends from a token to what came after earlier tokens like it, so its queries and keys, without positions,
tell where in a long text something like the last tokens was said. Other heads that were tried find less.

Shapes: B rows, H query heads, G key/value heads, T tokens, D head width.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memorizing_transformers_pytorch.huggingface.calls import Call, Shared
from memorizing_transformers_pytorch.huggingface.layers import ENOUGH, induction_heads
from memorizing_transformers_pytorch.huggingface.models import evaluating, run
from memorizing_transformers_pytorch.huggingface.probe import Layer
from memorizing_transformers_pytorch.utils.context import PerContext

NAME = "memorizing_finder"  # of an attention function that computes nothing, but hands over what it is given


class Head(NamedTuple):
    """Query head number `head` of a layer, and its induction score, from 0 to 1."""

    layer: int
    head: int
    score: float


def best_head(model: Any, served: dict[int, Layer]) -> Head | None:
    """The head with the best induction score; None if the model has no induction head."""
    heads = (
        Head(index, head, score)
        for index, scores in induction_heads(model, served).items()
        for head, score in enumerate(scores)
    )
    best = max(heads, key=lambda each: each.score, default=None)
    return None if best is None or best.score < ENOUGH else best


class _HandedOver(Exception):
    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.query, self.key = query, key


def _hand_over(_module: nn.Module, query: Tensor, key: Tensor, *_: Any, scaling: float | None = None, **__: Any) -> Any:
    raise _HandedOver(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key)


class Finder:
    """Computes queries and keys of one head, without positions, by running the model as far as its layer.

    The model is left as it is: the hook on that layer does nothing in other calls.
    """

    def __init__(self, layer: Layer, head: Head, shared: Shared) -> None:
        self.layer, self.head, self.kv_head = layer, head, head.head // (layer.heads // layer.kv_heads)
        self._shared, self._runs = shared, PerContext(False)
        self._hook: Any = None

    @property
    def width(self) -> int:
        """D."""
        return self.layer.width

    def attach(self) -> None:
        self._hook = self.layer.module.register_forward_pre_hook(self._intercept, with_kwargs=True)

    def detach(self) -> None:
        self._hook.remove()

    def vectors(self, model: Any, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, T), padded on the right where mask (B, T) is 0 -> queries, scaled, and keys (B, T, D), float32."""
        call = Call({}, {}, [], [], enabled=False)
        try:
            with evaluating(model), self._runs.at(True), self._shared.call.at(call):
                run(model, tokens, attention_mask=mask)
        except _HandedOver as found:
            query, key = found.query[:, self.head.head : self.head.head + 1], found.key[:, [self.kv_head]]
            places = torch.arange(tokens.shape[-1])[None]
            return self.unturned(query, places)[:, 0], self.unturned(key, places)[:, 0]
        raise ValueError(f"layer {self.head.layer} did not run in a call of its model")

    def unturned(self, x: Tensor, places: Tensor) -> Tensor:
        """x (B, 1, T, D) at these places (B, T) or (1, T), turned back to position 0, in float32."""
        return x.float() if self.layer.rotary is None else self.layer.rotary.turned(x, -places)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _intercept(self, module: Any, inputs: Any, options: dict[str, Any]) -> None:
        if not self._runs.now:
            return
        bare = copy.copy(module)
        bare.config = copy.copy(module.config)
        bare.config._attn_implementation_internal = NAME
        type(module).forward(bare, *inputs, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, _hand_over)
