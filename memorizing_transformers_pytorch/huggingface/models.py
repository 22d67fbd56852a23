"""What can be done with any model of transformers: run it on some tokens, and ask what it was made for.

Shapes: B rows, T tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.huggingface.hooks import Hooks


def positions_of(model: Any) -> int | None:
    """The longest context that the model was made for, if it says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or None


def vocabulary_of(model: Any) -> int:
    """How many token ids the model embeds. (The shape of quantised weights does not tell.)"""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return int(size or model.config.get_text_config().vocab_size)


def name_of(model: Any) -> str:
    """The last part of the name or path that the model was loaded from, or else its class."""
    return Path(str(model.config.name_or_path)).name or type(model).__name__


def check_ids(tokens: Tensor, vocabulary: int, where: str) -> None:
    """Raises ValueError for token ids that a model of this vocabulary does not have."""
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        found = f"{int(tokens.min())} to {int(tokens.max())}"
        raise ValueError(f"expected token ids of this model, 0 to {vocabulary - 1}, got {found} in {where}")


def check_model(model: Any) -> None:
    """Raises ValueError unless this is a causal language model of transformers, decoder-only, without a memory."""
    name = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise ValueError(f"expected a model of transformers, got {name}: attach to its get_base_model()")
    if not hasattr(model, "config") or not hasattr(model, "can_generate") or not model.can_generate():
        raise ValueError(f"expected a causal language model of transformers, got {name}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"expected a decoder-only model, got the encoder-decoder {name}")
    if any(isinstance(getattr(hook, "__self__", None), Hooks) for hook in model._forward_pre_hooks.values()):
        raise ValueError(f"expected a model without a memory, got {name}, which has one: detach() it first")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and learns nothing; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run(
    model: Any,
    tokens: Tensor,
    offset: int = 0,
    attention_mask: Tensor | None = None,
    logits_to_keep: int = 1,
    cache: Any = None,
) -> Any:
    """A forward pass over tokens (T,) or (B, T), whose first stands at `offset`, with a cache only if it is given.

    Where the mask begins with padding, positions are counted from what comes after it.
    """
    tokens = tokens.to(device := _device_of(model)).reshape(-1, tokens.shape[-1])
    options: dict[str, Any] = {}
    if offset:
        options["position_ids"] = offset + torch.arange(tokens.shape[1], device=device)[None].expand_as(tokens)
    if attention_mask is not None:
        options["attention_mask"] = attention_mask.to(device)
        if not bool(attention_mask[:, 0].all()) and "position_ids" in inspect.signature(model.forward).parameters:
            options["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0).to(device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = logits_to_keep
    return model(input_ids=tokens, use_cache=cache is not None, past_key_values=cache, **options)


def _device_of(module: nn.Module) -> torch.device:
    """The device of its weights, or to which accelerate brings them from elsewhere."""
    for each in module.modules():
        hook = getattr(each, "_hf_hook", None)
        if hook is not None and getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(chain(module.parameters(), module.buffers())).device
