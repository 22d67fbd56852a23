"""The options of `evaluate`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Loss of a run on held-out documents, with memories of several sizes and with memories that should be of no use.

    Writes evaluation.json, evaluation.md and evaluation.png. A model of transformers is evaluated on the documents of
    --source, with its memory and without.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run; "shipped" is one that comes with the package. Or name or folder of a causal language model of
    transformers."""
    memory: str | None = None
    """Sizes of the memory in entries, such as 0,512,2048; 0 (off) is always included. By default 0, 512, 2048, 8192 and
    the size in the run."""
    controls: bool = True
    """Also read another document's memory, shuffled values and random keys, at the memory size of the run, or at the
    largest size if that of the run is not evaluated."""
    split: Literal["test", "valid"] = "test"
    """Which held-out documents of the run."""
    source: str | None = None
    """Evaluate on all of this text instead: a file, a folder, hf:NAME, ... (as --data.source of train). Pattern, group,
    columns, max_documents, ... are those of the run. For a model of transformers a file, or a folder of them."""
    memories: Path | None = None
    """Of a model of transformers: look up what is in this folder, which `memory build` made with it, instead of what
    was read of each document; it is not changed."""
    retrieve: Literal["tokens", "spans"] | None = None
    """How a model of transformers remembers: spans, passages that stand before a text (the default), or tokens, which
    its attention looks up."""
    text_column: str | None = None
    """The column of --source that holds the text; by default that of the run."""
    cache: Path | None = None
    """Folder for downloads and tokenised text; by default that of the run."""
    min_tokens: int = 2
    """Leave out documents with fewer tokens."""
    max_tokens: int | None = None
    """Score only the first tokens of each document, this many."""
    documents: int | None = None
    """Evaluate on this many documents, drawn at random; by default on all."""
    rows: int = 4
    """Documents that are read side by side."""
    checkpoint: Literal["last", "best"] = "last"
    """Which weights of the run."""
    index: str | None = None
    """How memories are searched: exact, auto or a faiss factory string; by default as in training."""
    output: Path | None = None
    """Folder to write to; by default "evaluation" in the run, or of another model here. An older report is replaced at
    the end."""
    seed: int = 0
    """Seed of the documents drawn, of shuffling, random keys and intervals."""
    device: str | None = None
    """Such as cpu or cuda; by default cuda where there is one."""


parse = functools.partial(parse_arguments, Evaluate)
