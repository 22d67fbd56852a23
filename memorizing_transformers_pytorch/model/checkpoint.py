"""A model in one safetensors file: its weights, and its configuration as metadata. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from memorizing_transformers_pytorch.model.config import ModelConfig
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.utils.durable import replacing
from memorizing_transformers_pytorch.utils.plain_json import parse_object

_CONFIG_KEY = "model_config"
_OUTPUT_WEIGHT = "to_logits.1.weight"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save_checkpoint(model: MemorizingTransformer, path: str | Path) -> None:
    """Write the model to `path`, replacing what was there only once the new file is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights[_OUTPUT_WEIGHT]
    with replacing(path) as aside:
        save_file(weights, aside, metadata={_CONFIG_KEY: json.dumps(model.config.to_dict())})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError for a file that is missing or not one."""
    if not Path(path).is_file():
        raise ValueError(f"expected a checkpoint file, got {str(path)!r}, which does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {str(path)!r}: {error}") from error


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> MemorizingTransformer:
    """The model that `save_checkpoint` wrote. Raises ValueError for a file that is missing or not such a checkpoint."""
    weights = read_weights(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if _CONFIG_KEY not in metadata:
        raise ValueError(f"expected {_CONFIG_KEY!r} in the metadata of {str(path)!r}, got {sorted(metadata)}")
    where = f"the metadata of {str(path)!r}"
    config = ModelConfig.from_dict(parse_object(metadata[_CONFIG_KEY], where))
    _check_weights(_without_memory(config, weights), weights)
    model = MemorizingTransformer.from_config(config)
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    load_weights(model, weights)
    return model.to(device)


def load_weights(model: MemorizingTransformer, weights: Mapping[str, Tensor]) -> None:
    """Copy a state dict into the model: one of ours, or of the package memorizing-transformers-pytorch 0.4.1.

    Raises ValueError that lists the names that are missing, unknown, or of another shape or type; the model is then
    unchanged.
    """
    model.load_state_dict(_check_weights(model, weights))


def check_dtypes(weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError for tensors that are of no type that weights have."""
    wrong = [f"{name}: {tensor.dtype}" for name, tensor in weights.items() if tensor.dtype not in _DTYPES]
    if wrong:
        raise ValueError(f"expected weights of {', '.join(map(str, _DTYPES))}, got {'; '.join(wrong)}")


def _without_memory(config: ModelConfig, weights: Mapping[str, Tensor]) -> MemorizingTransformer:
    """The model, but for its numbers: a damaged configuration may tell of more than any machine holds."""
    if config.depth > len(weights):
        raise ValueError(f"expected the weights of {config.depth} layers, got {len(weights)} tensors")
    try:
        with torch.device("meta"):
            return MemorizingTransformer.from_config(config)
    except RuntimeError as error:
        raise ValueError(f"expected the sizes of a model, got {config}: {error}") from error


def _check_weights(model: MemorizingTransformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the model, whose tied weights are said once, whole."""
    expected = model.state_dict()
    weights = dict(weights)
    if model.config.tie_embeddings and "token_emb.weight" in weights:
        weights.setdefault(_OUTPUT_WEIGHT, weights["token_emb.weight"])
    missing = sorted(set(expected) - set(weights))
    unknown = sorted(set(weights) - set(expected))
    if missing or unknown:
        raise ValueError(f"expected the weights of this model, got missing {missing} and unknown {unknown}")
    wrong = [
        f"{n}: {tuple(expected[n].shape)}, got {tuple(t.shape)}"
        for n, t in weights.items()
        if t.shape != expected[n].shape
    ]
    if wrong:
        raise ValueError(f"expected weights of these shapes: {'; '.join(wrong)}")
    check_dtypes(weights)
    return weights
