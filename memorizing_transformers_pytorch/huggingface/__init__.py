"""A memory for causal language models of transformers (the extra `huggingface`).

`attach_memory` gives some layers of a model a memory, which they read with their own attention.
"""

from __future__ import annotations

from memorizing_transformers_pytorch.huggingface.added import Added
from memorizing_transformers_pytorch.huggingface.attach import attach_memory
from memorizing_transformers_pytorch.huggingface.attached import AttachedMemory
from memorizing_transformers_pytorch.huggingface.layers import suggest_layers
from memorizing_transformers_pytorch.huggingface.ledger import Document

__all__ = ["Added", "AttachedMemory", "Document", "attach_memory", "suggest_layers"]
