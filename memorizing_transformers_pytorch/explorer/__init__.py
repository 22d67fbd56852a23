"""See what is remembered, and what was looked up."""

from memorizing_transformers_pytorch.explorer.explain import explain
from memorizing_transformers_pytorch.explorer.explanation import Explanation, LookedUpPassage

__all__ = ["Explanation", "LookedUpPassage", "explain"]
