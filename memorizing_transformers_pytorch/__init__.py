"""Transformers that remember: kNN-augmented attention over a large external memory (Wu et al., ICLR 2022)."""

from memorizing_transformers_pytorch.attention.knn_attention import KNNAttention
from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList, Retrieved
from memorizing_transformers_pytorch.model.checkpoint import load_checkpoint, load_weights, save_checkpoint
from memorizing_transformers_pytorch.model.config import ModelConfig
from memorizing_transformers_pytorch.model.generation import generate, stream
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.model.session import Session
from memorizing_transformers_pytorch.utils.version import __version__

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
