"""What is remembered. Knows numbers, rows and slots; nothing of models or training."""

from memorizing_transformers_pytorch.memory.checks import NonFiniteError, warn_once
from memorizing_transformers_pytorch.memory.entries import ORIGIN_FIELDS, UNKNOWN
from memorizing_transformers_pytorch.memory.knn_memory import KNNMemory
from memorizing_transformers_pytorch.memory.lease import Lookup, Retrieved
from memorizing_transformers_pytorch.memory.memory_list import KNNMemoryList

__all__ = [
    "ORIGIN_FIELDS",
    "UNKNOWN",
    "KNNMemory",
    "KNNMemoryList",
    "Lookup",
    "NonFiniteError",
    "Retrieved",
    "warn_once",
]
