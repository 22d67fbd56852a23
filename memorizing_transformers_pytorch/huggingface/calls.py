"""What a model is called with, seen by a hook.

Shapes: B rows, T tokens of a call, S tokens with those before them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.memory import UNKNOWN


@dataclass(frozen=True)
class Call:
    """tokens: (B, T) int64. places: (B, T) int64, the positions that the model gives them. seen: (B, S) bool, False for
    padding, also of the tokens before that a cache has seen. cache: what the model keeps of earlier calls."""

    tokens: Tensor
    places: Tensor
    seen: Tensor
    cache: Any

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, False for padding."""
        return self.seen[:, -self.tokens.shape[1] :]

    @property
    def next_places(self) -> Tensor:
        """(B,): what comes after the last token that is no padding; 0 where all are."""
        return ((self.places + 1) * self.mask).amax(dim=1)


class Calls:
    """Tells about each call of a model: `before(see)` it, which may raise, and `after()` it, if it did not raise.

    `see()` gives the call. It copies tokens and mask to the CPU, for which a GPU must wait: only where they are needed.

    The hooks are on the model inside, which is called also where adapters (PEFT) go round the outermost one.
    """

    def __init__(self, model: Any, before: Callable[[Callable[[], Call]], None], after: Callable[[], None]) -> None:
        inside: nn.Module = model.base_model
        signature = inspect.signature(inside.forward)

        def enter(_module: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
            before(lambda: _call(signature.bind_partial(*inputs, **options).arguments))

        self._hooks = [
            inside.register_forward_pre_hook(enter, with_kwargs=True),
            inside.register_forward_hook(lambda *_: after()),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _call(given: dict[str, Any]) -> Call:
    given = {**given.pop("kwargs", {}), **given}
    tokens, embedded = given.get("input_ids"), given.get("inputs_embeds")
    if tokens is None:
        assert embedded is not None
        tokens = torch.full(embedded.shape[:2], UNKNOWN)
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    before = 0 if cache is None else int(cache.get_seq_length())
    seen = torch.ones(len(tokens), before + tokens.shape[1]).bool()
    if isinstance(mask, Tensor) and mask.ndim == 2:
        seen = mask[:, : seen.shape[1]].bool().cpu()
    places = given.get("position_ids")
    if not isinstance(places, Tensor) or places.ndim != 2:
        places = torch.arange(before, before + tokens.shape[1])[None]
    return Call(tokens.detach().cpu().long(), places.cpu().expand_as(tokens).long(), seen, cache)
