"""`memorizing-transformers memory build | info | documents | forget | verify | compact | merge`: memories on disk."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memorizing_transformers_pytorch.cli.models import chosen_device
from memorizing_transformers_pytorch.cli.options.memory import (
    Build,
    Compact,
    Documents,
    Forget,
    Info,
    Merge,
    OfMemory,
    Verify,
)
from memorizing_transformers_pytorch.cli.texts import MORE_ROOM
from memorizing_transformers_pytorch.data.texts import files_below
from memorizing_transformers_pytorch.library.build import Builder, check_different
from memorizing_transformers_pytorch.library.readers import DocumentReader, open_reader, spans_in, spans_of
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.memory.disk.load import How, load, state_of
from memorizing_transformers_pytorch.memory.disk.manifest import NAME
from memorizing_transformers_pytorch.memory.disk.save import locked, make_folder, refuse_others
from memorizing_transformers_pytorch.memory.ledger import DocumentTable, by_layer
from memorizing_transformers_pytorch.utils.interrupts import stopping_on_signals
from memorizing_transformers_pytorch.utils.progress import bar


def build(options: Build) -> dict[str, Any]:
    exists = (options.memory / NAME).exists()
    files = files_below(options.files, options.pattern, may_be_none=options.prune and exists)
    reader = _reader(options, exists=exists)
    folder = options.memory.resolve()
    state = state_of(folder).state if exists else None
    if exists:
        reader.load(folder)  # before anything is written: it may be refused
    make_folder(folder)
    with locked(folder), stopping_on_signals() as wish:
        if exists and state_of(folder).state != state:  # another process has written it since
            reader.load(folder)
        total = sum(path.stat().st_size for path in files if path.is_file())
        with bar(total=total, unit="B", unit_scale=True) as progress:

            def tell(name: str, size: float) -> None:
                progress.set_postfix_str(Path(name).name, refresh=False)
                progress.update(min(size, total - progress.n))

            builder = Builder(reader, lambda: reader.memory.save(folder), options.save_every, wish)
            outcome = builder.build(files, tell, prune=options.prune)
        reader.memory.save(folder, compact=True)
    for line in outcome.messages(MORE_ROOM):
        print(line, file=sys.stderr)
    counts = {name: len(each) for name, each in asdict(outcome).items()}
    return counts | {"documents": len(reader.memory.ledger.documents())}


def _reader(options: Build, *, exists: bool) -> DocumentReader:
    """The model that reads. Raises ValueError for options that do not fit together."""
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    for_new = (options.retrieve, options.content, options.max_memories, dtype)
    if exists and any(each is not None for each in for_new):
        names = "--retrieve, --content, --max-memories and --dtype"
        raise ValueError(f"{str(options.memory)!r} exists: {names} are for a new memory only")
    spans = spans_of(options.memory if exists else None, options.retrieve, options.model)
    if options.content is not None and spans is None:
        raise ValueError("--content is for a memory of spans, which models of transformers have")
    refuse_others(options.memory)
    return open_reader(
        options.model,
        chosen_device(options.device),
        max_memories=options.max_memories,
        dtype=dtype,
        index=options.index,
        spans=spans if options.content is None or spans is None else spans | {"content": options.content},
    )


def info(options: Info) -> dict[str, Any]:
    manifest = state_of(options.memory)
    held = KNNMemoryList.load(options.memory, mmap=True)
    return {
        "saved": manifest.saved,
        "package": manifest.package,
        "of": ", ".join(dict.fromkeys(map(str, (manifest.extra.get("kind"), *manifest.extra.get("arranged", []))))),
        "fingerprint": manifest.fingerprint,
        "documents": len(manifest.documents),
        "tokens": sum(each.tokens for each in manifest.documents),
        "rows": held[0].num_indices if held else 0,
        "layers": manifest.extra.get("layers", list(range(len(held)))),
        "entries": by_layer([sum(memory.num_entries) for memory in held], held.of_layers),
        "capacity": by_layer([memory.max_memories for memory in held], held.of_layers),
        "width": [memory.dim for memory in held],
        "kv_heads": [memory.num_kv_heads for memory in held],
        "dtype": sorted({base.dtype for base in manifest.memories}),
        "index": sorted({base.index for base in manifest.memories}),
        "policy": sorted({base.policy for base in manifest.memories}),
        "journals": len(manifest.journals),
        "bytes": manifest.num_bytes,
    }


def documents(options: Documents) -> DocumentTable:
    return KNNMemoryList.load(options.memory, mmap=True).documents()


def forget(options: Forget) -> dict[str, Any]:
    if bool(options.document) == (options.where is not None):
        raise ValueError("choose documents either by --document or by --where")
    memories = KNNMemoryList.load(options.memory, mmap=True, verify=True)
    table = memories.documents()
    if options.where is not None:
        count = memories.forget(where=lambda each: fnmatch.fnmatch(each.title, str(options.where)))
    else:
        titles = {each.title for each in table}
        count = memories.forget([name if name in titles else _number(name) for name in options.document])
    memories.save(options.memory, compact=True)
    return {"documents": len(table) - len(memories.documents()), "entries": count}


def _number(name: str) -> int:
    if not name.isdecimal():
        raise ValueError(f"{name!r} is neither the title nor the number of a document; `memory documents` lists them")
    return int(name)


def verify(options: Verify) -> dict[str, Any]:
    found = load(options.memory.resolve(), How(mmap=True, verify=True))
    return {"files": len(list(found.manifest.files())), "bytes": found.manifest.num_bytes, "damaged": 0}


def compact(options: Compact) -> dict[str, Any]:
    memories = KNNMemoryList.load(options.memory, mmap=True, verify=True)
    before = state_of(options.memory).num_bytes
    memories.save(options.memory, compact=True)
    return {"bytes_before": before, "bytes": state_of(options.memory).num_bytes}


def merge(options: Merge) -> dict[str, Any]:
    check_different(options.output, options.memories)
    refuse_others(options.output)
    if options.model is not None:
        spans = spans_in(options.memories[0])
        reader = open_reader(options.model, "cpu", max_memories=None, dtype=None, index=None, spans=spans)
        reader.load(options.memories[0])
        for folder in options.memories[1:]:
            reader.merge(folder)
        merged = reader.memory
    elif any("arranged" in state_of(path).extra for path in options.memories):
        raise ValueError("add --model: it is needed to merge memories of a model of transformers")
    else:
        merged, *others = [KNNMemoryList.load(path, mmap=True, verify=True) for path in options.memories]
        for other in others:
            merged.merge(other)
    merged.save(options.output)
    table = merged.documents()
    return {"documents": len(table), "entries": [sum(each) for each in zip(*(d.entries for d in table), strict=True)]}


COMMANDS: dict[type[Any], Callable[[Any], Any]] = {
    Build: build,
    Info: info,
    Documents: documents,
    Forget: forget,
    Verify: verify,
    Compact: compact,
    Merge: merge,
}


def main(options: OfMemory | Merge) -> None:
    """Run a command of `memory`. Raises ValueError for bad input."""
    show(COMMANDS[type(options)](options), as_json=options.json)


def show(result: Any, *, as_json: bool) -> None:
    """Print the result of a command."""
    if isinstance(result, DocumentTable):
        print(json.dumps(result.to_dicts(), indent=1) if as_json else result)
    elif as_json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name.replace('_', ' '):14} {_in_words(value)}")


def _in_words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value)) if len(set(map(str, value))) != 1 else _in_words(value[0])
    return f"{value:,}" if isinstance(value, int) else str(value)
