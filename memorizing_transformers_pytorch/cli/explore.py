"""`memorizing-transformers explore [RUN | MEMORY]`: look into a memory, in a browser."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from memorizing_transformers_pytorch.cli.arguments import chosen_device, default_model, name_of, parse_arguments
from memorizing_transformers_pytorch.library.readers import OF_RUN, open_reader, spans_of
from memorizing_transformers_pytorch.memory.disk.load import state_of
from memorizing_transformers_pytorch.memory.disk.manifest import NAME
from memorizing_transformers_pytorch.training.run import CONFIG


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


def main(arguments: Sequence[str], program: str) -> None:
    """Run `explore` with these arguments. Raises ValueError for bad input."""
    options = parse_arguments(Explore, arguments, program)
    if not 1 <= options.port <= 65_535:
        raise ValueError(f"expected a port from 1 to 65535, got {options.port}")
    model, memory = chosen(options)
    try:
        from memorizing_transformers_pytorch.explorer.app import launch
    except ImportError as error:
        raise ValueError(f"expected the extra 'explorer' to be installed, got {error}") from error
    from memorizing_transformers_pytorch.explorer.service import Service

    if memory is not None and options.retrieve is not None:
        raise ValueError("--retrieve is for a new memory: one on disk is used as it was built")
    spans = spans_of(memory, options.retrieve, model)
    reader = open_reader(model, chosen_device(options.device), max_memories=None, dtype=None, index=None, spans=spans)
    service = Service(reader, memory, read_only=options.read_only)
    name = name_of(model) if memory is None else f"{memory}, with {name_of(model)}"
    blocks, address = launch(service, name, options.port)
    taken = "" if address.endswith(f":{options.port}") else f" (port {options.port} is taken)"
    print(f"{address}{taken}; Ctrl+C ends it", flush=True)
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)


def chosen(options: Explore) -> tuple[str, Path | None]:
    """The model, and the folder of a memory if one was given. Raises ValueError for any other folder."""
    what = options.what
    if what is None:
        return (default_model() if options.model is None else options.model), None
    if (what / CONFIG).is_file():
        if options.model is not None:
            raise ValueError(f"expected a run or --model, got {str(what)!r} and {options.model!r}")
        return str(what), None
    if not (what / NAME).is_file():
        raise ValueError(f"expected the folder of a run or a memory, got {str(what)!r}")
    if options.model is not None:
        return options.model, what
    if state_of(what).extra.get("kind") != OF_RUN:
        raise ValueError("expected --model, for a memory of a model of transformers, got none")
    return default_model(), what
