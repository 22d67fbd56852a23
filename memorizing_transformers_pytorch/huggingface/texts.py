"""What a user gives to be read or asked, as token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memorizing_transformers_pytorch.huggingface.models import vocabulary_of
from memorizing_transformers_pytorch.memory.entries import as_int64


def tokens_of(text: str | Tensor, tokenizer: Any, model: Any) -> Tensor:
    """Text, or token ids (N,) or (1, N) -> (N,). Raises ValueError for what has no tokens, and text without a
    tokenizer."""
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("text needs a tokenizer: attach_memory(model, tokenizer=tokenizer), or give token ids")
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)
    else:
        tokens = as_int64(text, "token ids").cpu().flatten()
    if len(tokens) == 0:
        raise ValueError("there is nothing to look for: the question has no tokens")
    most = vocabulary_of(model)
    if int(tokens.min()) < 0 or int(tokens.max()) >= most:
        raise ValueError(f"token ids of this model are 0 to {most - 1}, got {int(tokens.min())} to {int(tokens.max())}")
    return tokens
