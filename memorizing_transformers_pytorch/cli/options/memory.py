"""The options of the commands of `memory`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments

Memory = tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class OfMemory:
    """What all of them take."""

    memory: Memory
    """Folder of the memory."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Build(OfMemory):
    """Read files into a memory on disk, a new one or one that exists. Unchanged files are skipped, changed ones read
    again, and documents whose files are no longer text removed. If interrupted, the same command continues."""

    files: tyro.conf.Positional[tuple[str, ...]]
    """Text files, and folders of them."""
    model: str
    """Folder of a run, or name or folder of a causal language model of transformers."""
    pattern: str = "*"
    """Which files of folders to read, such as *.py."""
    retrieve: Literal["tokens", "spans"] | None = None
    """How a new memory of a model of transformers is used: spans, passages that stand before a prompt, as `ask` and
    `chat` need it (the default), or tokens, which its attention looks up."""
    content: Literal["kv", "tokens"] | None = None
    """What a new memory of spans keeps: token ids alone (the default), or keys and values."""
    max_memories: int | None = None
    """Capacity of each layer, in entries, of a new memory; by default 262,144."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """How a new memory of a model of transformers stores keys and values; by default as in the model."""
    index: str | None = None
    """How a memory is searched: exact, auto or inverted lists of faiss; by default as before, and a new one auto."""
    device: str | None = None
    """Such as cpu or cuda; by default cuda if there is one."""
    save_every: float = 30.0
    """Seconds between saves."""
    prune: bool = False
    """Remove documents whose files are not among those given, or cannot be opened."""


@dataclass(frozen=True, kw_only=True)
class Info(OfMemory):
    """Show the model, the size and the contents of a memory."""


@dataclass(frozen=True, kw_only=True)
class Documents(OfMemory):
    """List the documents in a memory."""


@dataclass(frozen=True, kw_only=True)
class Forget(OfMemory):
    """Remove documents from a memory, also from its files."""

    document: tuple[str, ...] = ()
    """Titles or numbers."""
    where: str | None = None
    """Instead, a pattern of titles, such as */tests/*."""


@dataclass(frozen=True, kw_only=True)
class Verify(OfMemory):
    """Check every file of a memory against its checksum, and whether its contents are valid."""


@dataclass(frozen=True, kw_only=True)
class Compact(OfMemory):
    """Rewrite a memory without anything that was forgotten or overwritten."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Write a new memory with the documents of two or more others, all of the same model."""

    output: Memory
    """Folder to write, which must not hold a memory."""
    memories: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of memories."""
    model: str | None = None
    """The model; needed for memories of models of transformers, whose keys are moved to new positions."""
    json: bool = False
    """Print JSON."""


KINDS: dict[str, type[OfMemory | Merge]] = {
    kind.__name__.lower(): kind for kind in (Build, Info, Documents, Forget, Verify, Compact, Merge)
}


def parse(arguments: Sequence[str], program: str) -> OfMemory | Merge:
    """Raises ValueError for an unknown command, unknown options and bad values."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:10} {' '.join((kind.__doc__ or '').split())}" for name, kind in KINDS.items()]
        print(f"usage: {program} COMMAND ...  (COMMAND --help tells its options)\n\n" + "\n".join(lines))
        if not arguments:
            raise ValueError(f"expected a command among {', '.join(KINDS)}, got none")
        sys.exit(0)
    name, *rest = arguments
    if name not in KINDS:
        raise ValueError(f"expected a command among {', '.join(KINDS)}, got {name!r}")
    return parse_arguments(KINDS[name], rest, f"{program} {name}")
