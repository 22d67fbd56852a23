"""Memories and models for transformers (the extra `huggingface`).

`attach_memory` gives some layers of a causal language model a memory, which they read with their own attention.
`MemorizingTransformerForCausalLM` is our own model as one of transformers, and `export_run` writes a run as such.
"""

from __future__ import annotations

from memorizing_transformers_pytorch.huggingface.asking import Answer, AnswerStream, Chat
from memorizing_transformers_pytorch.huggingface.attach import attach_memory, memory_of
from memorizing_transformers_pytorch.huggingface.attached import AttachedMemory
from memorizing_transformers_pytorch.huggingface.causal_lm import (
    MemorizingTransformerConfig,
    MemorizingTransformerForCausalLM,
)
from memorizing_transformers_pytorch.huggingface.export import export_run
from memorizing_transformers_pytorch.huggingface.layers import suggest_layers
from memorizing_transformers_pytorch.huggingface.prompts import Asked, Excerpt
from memorizing_transformers_pytorch.huggingface.recalling import RecallMemory
from memorizing_transformers_pytorch.memory.ledger import Document

__all__ = [
    "Answer",
    "AnswerStream",
    "Asked",
    "AttachedMemory",
    "Chat",
    "Document",
    "Excerpt",
    "MemorizingTransformerConfig",
    "MemorizingTransformerForCausalLM",
    "RecallMemory",
    "attach_memory",
    "export_run",
    "memory_of",
    "suggest_layers",
]
