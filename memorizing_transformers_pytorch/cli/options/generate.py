"""The options of `generate`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text with a model that reads with its memory whatever comes before."""

    run: tyro.conf.Positional[Path]
    """Folder of the run; "shipped" is one that comes with the package. Or name or folder of a causal language model of
    transformers."""
    prompt: str = ""
    """Text to continue; - reads it from standard input."""
    read: tuple[str, ...] = ()
    """Text files to read before the prompt, one after the other, of any length; - for standard input. A model of
    transformers reads each into its memory, as a document."""
    retrieve: Literal["tokens", "spans"] | None = None
    """With --read, how a model of transformers remembers: spans, passages that stand before a text (the default), or
    tokens, which its attention looks up."""
    max_new_tokens: int = 200
    """Tokens to write."""
    temperature: float = 0.6
    """Temperature of sampling; 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample only from this many of the likeliest tokens."""
    top_p: float | None = None
    """Sample from the fewest tokens that together have this probability."""
    stop: str | None = None
    """End before this text."""
    memories: Path | None = None
    """Start with the memory in this folder, which `memory build` made with this model; it is not changed."""
    memory: bool = True
    """Use the memory, or the local context alone."""
    index: str | None = None
    """How the memory is searched: exact, auto or a faiss factory string; by default as in training."""
    segment_length: int | None = None
    """Local context; by default that of the run."""
    seed: int = 0
    """Seed of sampling."""
    checkpoint: Literal["last", "best"] = "last"
    """Which weights of the run."""
    device: str | None = None
    """Such as cpu or cuda; by default cuda where there is one."""


parse = functools.partial(parse_arguments, Generate)
