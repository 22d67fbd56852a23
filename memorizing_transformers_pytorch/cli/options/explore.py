"""The options of `explore`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments


@dataclass(frozen=True, kw_only=True)
class Explore:
    """Read texts into a memory, ask, see what is looked up, and forget, on a page of this machine alone."""

    what: tyro.conf.Positional[Path | None] = None
    """Folder of a run, or of a memory, which is not changed unless you save to it; by default the newest run below
    ./runs, or the small model that comes with the package."""
    model: str | None = None
    """The model for a memory: folder of a run, or name or folder of a causal language model of transformers, or
    "shipped"."""
    retrieve: Literal["tokens", "spans"] | None = None
    """How a new memory of a model of transformers is used: spans, passages that stand before a text (the default), or
    tokens, which its attention looks up."""
    port: int = 7860
    """Port of the page; if it is taken, the next free one."""
    read_only: bool = False
    """Ask and look only: nothing is read, forgotten or saved."""
    device: str | None = None
    """Such as cpu or cuda; by default cuda where there is one."""


parse = functools.partial(parse_arguments, Explore)
