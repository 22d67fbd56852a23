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
from memorizing_transformers_pytorch.library.build import Builder, files_below
from memorizing_transformers_pytorch.library.readers import open_reader
from memorizing_transformers_pytorch.library.room import in_words
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.memory.disk.folder import locked, make_folder, refuse_others
from memorizing_transformers_pytorch.memory.disk.load import How, load, state_of
from memorizing_transformers_pytorch.memory.disk.manifest import NAME
from memorizing_transformers_pytorch.memory.documents import DocumentTable, by_layer
from memorizing_transformers_pytorch.utils.interrupts import stopping_on_signals
from memorizing_transformers_pytorch.utils.progress import bar

Memory = tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class Build:
    """Read files into a memory on disk, which is made unless it is there. Files that are in it are skipped, those that
    have changed are read anew; after it was broken off the same command goes on."""

    memory: Memory
    """Folder of the memory."""
    files: tyro.conf.Positional[tuple[str, ...]]
    """Text files, and folders of them."""
    model: str
    """Folder of a run, or name or folder of a causal language model of transformers."""
    pattern: str = "*"
    """Which files of folders to read, such as *.py."""
    max_memories: int | None = None
    """Entries that each layer can hold, for a new memory; 262,144 unless given."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    """How keys and values are kept, for a new memory of a model of transformers; as in the model unless given."""
    index: str | None = None
    """How the memory is searched: exact, auto or a faiss factory string; as before unless given."""
    device: str | None = None
    """Such as cpu or cuda; unless given, cuda where there is one."""
    save_every: float = 30.0
    """Seconds between saves while it is built."""
    prune: bool = False
    """Forget documents whose files are not among those given."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a memory is, and how much it holds."""

    memory: Memory
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents in a memory."""

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
    """Compare every file of a memory with its checksum, and look whether what it says can be."""

    memory: Memory
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Compact:
    """Write a memory anew without what it no longer needs."""

    memory: Memory
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Write a new memory with the documents of others, of the same model."""

    output: Memory
    """Folder to write, which must not hold a memory."""
    memories: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of memories."""
    model: str | None = None
    """The model, which is needed for memories of models of transformers: their keys are turned to new positions."""
    json: bool = False
    """Print JSON."""


def build(options: Build) -> dict[str, Any]:
    files = files_below(options.files, options.pattern)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    there = (options.memory / NAME).exists()
    if there and (options.max_memories is not None or dtype is not None):
        raise ValueError("expected --max-memories and --dtype for a new memory only, got them for one that is there")
    refuse_others(options.memory)
    device = chosen_device(options.device)
    reader = open_reader(options.model, device, max_memories=options.max_memories, dtype=dtype, index=options.index)
    folder = options.memory.resolve()
    make_folder(folder)
    with locked(folder), stopping_on_signals() as wish:
        if there:
            reader.load(folder)
        total = sum(path.stat().st_size for path in files)
        with bar(total=total, unit="B", unit_scale=True) as progress:

            def tell(name: str, size: float) -> None:
                progress.set_postfix_str(Path(name).name, refresh=False)
                progress.update(min(size, total - progress.n))

            builder = Builder(reader, lambda: reader.save(folder), options.save_every, wish)
            outcome = builder.build(files, tell, prune=options.prune)
        reader.save(folder, compact=True)
    for name, why in outcome.left_out.items():
        print(f"left out {name}: {why}", file=sys.stderr)
    for line in in_words(outcome.too_short, outcome.made_room, MORE_ROOM):
        print(line, file=sys.stderr)
    return {name: len(each) for name, each in asdict(outcome).items()} | {"documents": len(reader.ledger.documents())}


def info(options: Info) -> dict[str, Any]:
    manifest = state_of(options.memory)
    held = KNNMemoryList.load(options.memory, mmap=True)
    return {
        "saved": manifest.saved,
        "package": manifest.package,
        "of": manifest.extra.get("kind"),
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
        raise ValueError("expected --document or --where, got both or none")
    with locked(_existing(options.memory)):
        memories = KNNMemoryList.load(options.memory, mmap=True, verify=True)
        before = len(memories.documents())
        if options.where is not None:
            pattern = options.where
            count = memories.forget(where=lambda each: fnmatch.fnmatch(each.title, pattern))
        else:
            titles = {each.title for each in memories.documents()}
            count = memories.forget([name if name in titles else _number(name) for name in options.document])
        memories.save(options.memory, compact=True)  # also of documents whose entries have made room before
    return {"documents": before - len(memories.documents()), "entries": count}


def _number(name: str) -> int:
    if not name.isdigit():
        raise ValueError(f"expected the title or number of a document, got {name!r}")
    return int(name)


def _existing(folder: Path) -> Path:
    """The folder, resolved. Raises ValueError if there is no memory in it."""
    state_of(folder)
    return folder.resolve()


def verify(options: Verify) -> dict[str, Any]:
    found = load(options.memory.resolve(), How(mmap=True, verify=True))
    return {"files": len(list(found.manifest.files())), "bytes": found.manifest.num_bytes, "damaged": 0}


def compact(options: Compact) -> dict[str, Any]:
    with locked(_existing(options.memory)):
        memories = KNNMemoryList.load(options.memory, mmap=True, verify=True)
        before = state_of(options.memory).num_bytes
        memories.save(options.memory, compact=True)
    return {"bytes_before": before, "bytes": state_of(options.memory).num_bytes}


def merge(options: Merge) -> dict[str, Any]:
    if (options.output / NAME).exists():
        raise ValueError(f"expected a folder without a memory, got {str(options.output)!r}")
    refuse_others(options.output)
    if len(options.memories) < 2:
        raise ValueError(f"expected at least two memories, got {len(options.memories)}")
    if options.model is not None:
        return merge_with(options.model, options)
    if any("arranged" in state_of(path).extra for path in options.memories):
        raise ValueError("expected --model, to merge memories of a model of transformers, got none")
    first, *others = [KNNMemoryList.load(path, mmap=True, verify=True) for path in options.memories]
    for other in others:
        first.merge(other)
    first.save(options.output)
    return {"documents": len(first.documents()), "entries": [sum(memory.num_entries) for memory in first]}


def merge_with(model: str, options: Merge) -> dict[str, Any]:
    reader = open_reader(model, "cpu", max_memories=None, dtype=None, index=None)
    first, *others = options.memories
    reader.load(first)
    for other in others:
        reader.merge(other)
    reader.save(options.output)
    documents = reader.documents()
    return {
        "documents": len(documents),
        "entries": [sum(each) for each in zip(*(d.entries for d in documents), strict=True)],
    }


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
    """Print what a command has found."""
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
