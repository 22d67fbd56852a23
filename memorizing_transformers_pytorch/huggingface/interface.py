"""The attention function of layers that have been given a memory.

It lets the model's own backend attend to what it would attend to anyway, then joins what was found in the memory to the
result. With nothing in the memory the result is that of the backend, untouched.

Shapes: B rows, H query heads, G key/value heads, T queries, S local keys, D head width.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "memorizing"  # of the attention function; without "flash", which names kernels
QUERIES_AT_ONCE = 256
LEAST = torch.finfo(torch.float32).min  # unlike minus infinity it has gradients where a query sees nothing
BACKENDS = ("eager", "sdpa")
IGNORED_BY_SDPA = ("softcap", "s_aux")

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class Extension:
    """What takes part in the attention of one layer; see `use`."""

    def needs_lse(self) -> bool:
        """Whether `joined` will ask for `Local.lse`."""
        return False

    def joined(self, module: nn.Module, out: Tensor, query: Tensor, local: Local) -> Tensor:
        """out (B, T, H, D), of the backend -> what the layer shall give instead.

        module: the attention module that runs, which may be a copy of the one that was given to `use`.
        """
        raise NotImplementedError


class Local:
    """What a layer attends to without a memory: key, value (B, G, S, D), mask and the options of the backend; and the
    logarithm of the sum of the exponentials of all these logits (B, H, T), if the backend has told it."""

    def __init__(
        self, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any], lse: Tensor | None = None
    ) -> None:
        self.key, self.value, self.mask, self.options = key, value, mask, options
        self._lse = lse

    def multiplier(self, like: Tensor) -> Tensor:
        """() float32: of inner products, before the cap."""
        scaling = self.options.get("scaling")
        return torch.tensor(self.key.shape[-1] ** -0.5 if scaling is None else float(scaling), device=like.device)

    def logits(self, products: Tensor) -> Tensor:
        """Inner products of queries and keys -> logits in float32, scaled and capped as the backend does."""
        scaling = self.options.get("scaling")
        logits = products.float() * (self.key.shape[-1] ** -0.5 if scaling is None else scaling)
        cap = self.options.get("softcap")
        capped: Tensor = logits if cap is None else (logits / cap).tanh() * cap
        return capped

    def lse(self, query: Tensor) -> Tensor:
        """query (B, H, T, D) -> (B, H, T): the logarithm of the sum of the exponentials of all local logits."""
        if self._lse is not None:
            return self._lse
        parts = []
        for start in range(0, query.shape[2], QUERIES_AT_ONCE):
            block = slice(start, start + QUERIES_AT_ONCE)
            parts.append(self.masked(query[:, :, block], block, query.shape[2]).logsumexp(dim=-1))
        return torch.cat(parts, dim=2)

    def products(self, query: Tensor) -> Tensor:
        """query (B, H, T, D) -> inner products with the keys (B, H, T, S), in float32: in float16 they may overflow."""
        batch, heads, count, width = query.shape
        grouped = query.reshape(batch, self.key.shape[1], -1, width)
        return (grouped.float() @ self.key.float().mT).view(batch, heads, count, -1)

    def masked(self, query: Tensor, block: slice, num_queries: int) -> Tensor:
        """query (B, H, t, D), a block of so many -> logits (B, H, t, S), and one more for a sink, if there is one."""
        logits = self.logits(self.products(query))
        bias = self.options.get("position_bias")
        if bias is not None:
            logits = logits + bias[:, :, block, : logits.shape[-1]]
        if self.mask is not None:
            mask = self.mask[:, :, block, : logits.shape[-1]]
            logits = logits.masked_fill(~mask, LEAST) if mask.dtype == torch.bool else logits + mask
        elif num_queries > 1:  # then query i sees keys 0 ... i
            places = torch.arange(logits.shape[-1], device=logits.device)
            ahead = places > torch.arange(num_queries, device=logits.device)[block, None]
            logits = logits.masked_fill(ahead, LEAST)
        sinks = self.options.get("s_aux")
        if sinks is not None:
            logits = torch.cat((logits, sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)), dim=-1)
        return logits


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function: that of the model's own backend, and what the extension of this layer makes of it."""
    used: Any = getattr(module, "_memorizing", (None, module.config))  # another thread may just have left it
    extension, config = used
    bare = copy.copy(module)
    bare.config = config
    is_sdpa, lse = config._attn_implementation == "sdpa", None
    tells_lse = is_sdpa and _tells_lse(query, key, value, attention_mask, options)
    if tells_lse and extension is not None and extension.needs_lse():
        (out, lse), weights = _with_lse(query, key, value, attention_mask, options.get("scaling")), None
    else:
        out, weights = backend_of(module, config)(bare, query, key, value, attention_mask, **options)
    if extension is None:
        return out, weights
    if is_sdpa:
        options = {name: option for name, option in options.items() if name not in IGNORED_BY_SDPA}
    return extension.joined(module, out, query, Local(key, value, attention_mask, options, lse)), weights


def _tells_lse(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether SDPA would use its kernel for a CPU, which tells the lse, but without a gradient."""
    if torch.compiler.is_compiling() or query.device.type != "cpu" or options.get("dropout"):
        return False
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    masked = mask is None or (mask.ndim == 4 and mask.dtype in (torch.bool, query.dtype))
    return alike and masked and not learns and options.get("position_bias") is None


def _with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """What SDPA gives on a CPU, (B, T, H, D), and the lse (B, H, T), `LEAST` where a query sees nothing."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if mask is None:
        out, lse = attend(query, key, value, is_causal=query.shape[2] > 1, scale=scaling)
    else:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
        out, lse = attend(query, key, value, attn_mask=mask, scale=scaling)
        lse = lse.masked_fill(mask.isneginf().all(dim=-1), LEAST)  # the kernel tells 0
    return out.transpose(1, 2), lse


def backend_of(module: nn.Module, config: Any) -> AttentionFunction:
    """What this layer would call by itself. Raises ValueError for a backend whose masks are not understood here."""
    name = config._attn_implementation
    if name not in BACKENDS:
        raise ValueError(f"expected attn_implementation to be one of {BACKENDS}, got {name!r}: set it before attaching")
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: AttentionFunction | None = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    if found is None:
        raise ValueError(f"expected a model that attends through the attention interface, got {type(module).__name__}")
    return found


def use(module: Any, extension: Extension) -> None:
    """From now on the extension takes part in the attention of this layer. Nothing but the layer's `config` changes."""
    object.__setattr__(module, "_memorizing", (extension, module.config))
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = NAME


def leave(module: Any) -> None:
    """Undo `use`."""
    module.config = module._memorizing[1]
    del module._memorizing


def is_used(module: nn.Module) -> bool:
    return hasattr(module, "_memorizing")


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)  # here, for models that are unpickled in another process
