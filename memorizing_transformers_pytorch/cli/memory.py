"""`memorizing-transformers memory build | info | documents | forget | verify | compact | merge`: memories on disk."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from memorizing_transformers_pytorch.cli.arguments import MORE_ROOM, chosen_device, parse_arguments
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

Memory = tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class Build:
    """Read files into a memory on disk, a new one or one that exists. Unchanged files are skipped, changed ones read
    again, and documents whose files are no longer text removed. If interrupted, the same command continues."""

    memory: Memory
    """Folder of the memory."""
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
    """How a memory of tokens is searched: exact, auto or a faiss factory string; by default as before."""
    device: str | None = None
    """Such as cpu or cuda; by default cuda if there is one."""
    save_every: float = 30.0
    """Seconds between saves."""
    prune: bool = False
    """Remove documents whose files are not among those given, or cannot be opened."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show the model, the size and the contents of a memory."""

    memory: Memory
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """List the documents in a memory."""

    memory: Memory
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Forget:
    """Remove documents from a memory, also from its files."""

    memory: Memory
    document: tuple[str, ...] = ()
    """Titles or numbers."""
    where: str | None = None
    """Instead, a pattern of titles, such as */tests/*."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every file of a memory against its checksum, and whether its contents are valid."""

    memory: Memory
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Compact:
    """Rewrite a memory without anything that was forgotten or overwritten."""

    memory: Memory
    json: bool = False
    """Print JSON."""


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


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
    "build": (Build, build),
    "info": (Info, info),
    "documents": (Documents, documents),
    "forget": (Forget, forget),
    "verify": (Verify, verify),
    "compact": (Compact, compact),
    "merge": (Merge, merge),
}


def main(arguments: Sequence[str], program: str) -> None:
    """Run `memory` with these arguments. Raises ValueError for bad input."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:10} {' '.join((kind.__doc__ or '').split())}" for name, (kind, _) in COMMANDS.items()]
        print(f"usage: {program} COMMAND ...  (COMMAND --help tells its options)\n\n" + "\n".join(lines))
        if not arguments:
            raise ValueError(f"expected a command among {', '.join(COMMANDS)}, got none")
        sys.exit(0)
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(f"expected a command among {', '.join(COMMANDS)}, got {name!r}")
    kind, run = COMMANDS[name]
    options = parse_arguments(kind, rest, f"{program} {name}")
    show(run(options), as_json=options.json)


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
