"""See what is remembered, and what was looked up."""

from memorizing_transformers_pytorch.explorer.explain import explain
from memorizing_transformers_pytorch.explorer.explanation import Explanation, Passage

__all__ = ["Explanation", "Passage", "explain"]
