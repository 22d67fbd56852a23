"""`memorizing-transformers explore [RUN | MEMORY]`: look into a memory, in a browser."""

from __future__ import annotations

import threading
from pathlib import Path

from memorizing_transformers_pytorch.cli.models import chosen_device, default_model, name_of
from memorizing_transformers_pytorch.cli.options.explore import Explore
from memorizing_transformers_pytorch.library.readers import OF_RUN, open_reader, spans_of
from memorizing_transformers_pytorch.memory.disk.load import state_of
from memorizing_transformers_pytorch.memory.disk.manifest import NAME
from memorizing_transformers_pytorch.training.run import CONFIG


def main(options: Explore) -> None:
    """Run `explore`. Raises ValueError for bad input."""
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
