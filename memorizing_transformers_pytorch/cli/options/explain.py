"""The options of `explain`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Show where a model looks in its memory for each token of a text, and what each source is worth."""

    prompt: str = ""
    """The text to explain; - reads it from standard input. The model reads it as one segment and does not store it.
    With a memory of passages, the model writes on, and what it has written is explained."""
    question: str | None = None
    """Instead, with a memory of passages: a question, which is answered as by `ask`; the answer is explained."""
    max_new_tokens: int | None = None
    """With a memory of passages, tokens to write: by default 40 after a prompt, of an answer at most 256; 0 explains
    the prompt itself, each part by the passages that the tokens before it find."""
    model: str | None = None
    """Folder of a run, or name or folder of a causal language model of transformers; by default the newest run below
    runs/, or else "shipped", the small model that comes with the package."""
    memory: Path | None = None
    """Look up in the memory in this folder, which `memory build` made with this model; it is not changed."""
    read: tuple[str, ...] = ()
    """Text files, and folders of them, to read before the prompt; files of a folder that are not text are skipped."""
    retrieve: Literal["tokens", "spans"] | None = None
    """With --read, how a model of transformers remembers: spans, passages that stand before a text (the default), or
    tokens, which its attention looks up."""
    pattern: str = "*"
    """Which files of folders to read, such as *.py."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The page to write; by default report.html."""
    json: bool = False
    """Print JSON instead, with the 8 entries of each token that have the largest weights."""
    all_entries: bool = False
    """With --json: all entries, for each token, layer and head."""
    contribution: Literal["none", "ablate"] = "none"
    """What each passage is worth: ablate runs the text again without each of the most looked-up passages."""
    row: int = 0
    """Row of the memory."""
    max_memories: int | None = None
    """Entries that each layer can hold, without --memory; by default 262,144."""
    index: str | None = None
    """How the memory is searched: exact, auto or a faiss factory string."""
    device: str | None = None
    """Such as cpu or cuda; by default cuda where there is one."""


parse = functools.partial(parse_arguments, Explain)
