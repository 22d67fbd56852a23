"""Transformers that remember: kNN-augmented attention over a large external memory (Wu et al., ICLR 2022).

The public names are imported when they are first used: `import torch` takes seconds, and `--help` does not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memorizing_transformers_pytorch.utils.version import __version__

if TYPE_CHECKING:
    from memorizing_transformers_pytorch.attention.knn_attention import KNNAttention
    from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList, Retrieved
    from memorizing_transformers_pytorch.model.checkpoint import load_checkpoint, load_weights, save_checkpoint
    from memorizing_transformers_pytorch.model.config import ModelConfig
    from memorizing_transformers_pytorch.model.generation import generate, stream
    from memorizing_transformers_pytorch.model.model import MemorizingTransformer
    from memorizing_transformers_pytorch.model.session import Session

__all__ = [
    "KNNAttention",
    "KNNMemory",
    "KNNMemoryList",
    "MemorizingTransformer",
    "ModelConfig",
    "Retrieved",
    "Session",
    "__version__",
    "generate",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
    "stream",
]

_MODULES = {
    "KNNAttention": "attention.knn_attention",
    "KNNMemory": "memory",
    "KNNMemoryList": "memory",
    "MemorizingTransformer": "model.model",
    "ModelConfig": "model.config",
    "Retrieved": "memory",
    "Session": "model.session",
    "generate": "model.generation",
    "load_checkpoint": "model.checkpoint",
    "load_weights": "model.checkpoint",
    "save_checkpoint": "model.checkpoint",
    "stream": "model.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
