"""The options of `chat`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memorizing_transformers_pytorch.cli.arguments import parse_arguments


@dataclass(frozen=True, kw_only=True)
class Talk:
    """Talk with a model about what it has read: each line of standard input is a message. /quit ends."""

    model: str
    """Name or folder of a causal language model of transformers."""
    memory: Path | None = None
    """Folder of a memory of spans, which `memory build` made with this model; it is not changed."""
    read: Path | None = None
    """Instead, a text file or a folder of them to read first."""
    content: Literal["kv", "tokens"] | None = None
    """With --read, what is kept: token ids alone (the default), or keys and values."""
    finder: Literal["head", "bm25", "both"] | None = None
    """What finds passages: a head of the model, words, or both (the default, if the model has such a head)."""
    passages: int = 4
    """Passages that are given to the model with each message."""
    system: str | None = None
    """A message that comes before all others."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""
    device: str | None = None
    """Such as cpu or cuda; by default cuda where there is one."""


parse = functools.partial(parse_arguments, Talk)
