"""What is remembered. Knows numbers, rows and slots; nothing of models or training."""

from memorizing_transformers_pytorch.memory.knn_memory import KNNMemory
from memorizing_transformers_pytorch.memory.memory_list import KNNMemoryList
from memorizing_transformers_pytorch.memory.retrieved import Lookup, Retrieved

__all__ = ["KNNMemory", "KNNMemoryList", "Lookup", "Retrieved"]
