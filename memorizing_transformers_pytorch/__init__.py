"""Transformers that remember: kNN-augmented attention over a large external memory (Wu et al., ICLR 2022)."""

from memorizing_transformers_pytorch.config import ModelConfig
from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList, Retrieved
from memorizing_transformers_pytorch.model import MemorizingTransformer
from memorizing_transformers_pytorch.nn.knn_attention import KNNAttention

__version__ = "0.1.0"

__all__ = [
    "KNNAttention",
    "KNNMemory",
    "KNNMemoryList",
    "MemorizingTransformer",
    "ModelConfig",
    "Retrieved",
    "__version__",
]
