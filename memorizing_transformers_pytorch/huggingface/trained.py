"""What was trained of a memory, in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from memorizing_transformers_pytorch.huggingface.layer import BaseLayer
from memorizing_transformers_pytorch.model.checkpoint import check_dtypes, read_weights


def save_parameters(layers: Mapping[int, BaseLayer], path: str | Path) -> None:
    """Write the parameters of these layers to a safetensors file."""
    save_file({name: each.detach().cpu().contiguous() for name, each in _named(layers).items()}, path)


def load_parameters(layers: Mapping[int, BaseLayer], path: str | Path) -> None:
    """Take them from such a file. Raises ValueError, changing nothing, for those of other layers, and for a file that
    is missing or damaged."""
    found, own = read_weights(path), _named(layers)
    expected = {name: tuple(each.shape) for name, each in own.items()}
    got = {name: tuple(each.shape) for name, each in found.items()}
    if got != expected:
        raise ValueError(f"expected parameters of the shapes {expected}, got {got}")
    check_dtypes(found)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])


def _named(layers: Mapping[int, BaseLayer]) -> dict[str, nn.Parameter]:
    return {f"{index}.{i}": each for index, layer in layers.items() for i, each in enumerate(layer.parameters())}
