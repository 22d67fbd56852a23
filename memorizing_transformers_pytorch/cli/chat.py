"""`memorizing-transformers chat`: a conversation with a model about what it has read, with sources."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memorizing_transformers_pytorch.cli.arguments import chosen_device, parse_arguments
from memorizing_transformers_pytorch.library.readers import open_reader, spans_in

QUIT = "/quit"


@dataclass(frozen=True, kw_only=True)
class Talk:
    """Talk with a model about what it has read: each line of standard input is a message. /quit ends."""

    model: str
    """Name or folder of a causal language model of transformers."""
    memory: Path | None = None
    """Folder of a memory of spans, which `memory build` made with this model; it is not changed."""
    read: Path | None = None
    """Instead, a text file or a folder of them to read first."""
    content: Literal["kv", "tokens"] | None = None
    """With --read, what is kept: token ids alone (the default), or keys and values."""
    finder: Literal["head", "bm25", "both"] | None = None
    """What finds passages: a head of the model, words, or both; by default a head if the model has one."""
    passages: int = 1
    """Passages that stand before each message."""
    system: str | None = None
    """A message that comes before all others."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""
    device: str | None = None
    """Such as cpu or cuda; by default cuda where there is one."""


def main(arguments: Sequence[str], program: str) -> None:
    """Run `chat` with these arguments. Raises ValueError for bad input."""
    options = parse_arguments(Talk, arguments, program)
    chat = begin(options)
    while text := _next_message():
        answer(chat, text, options)
        print()


def _next_message() -> str | None:
    """None at the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == QUIT:
            return None
        if line.strip():
            return line.strip()


def begin(options: Talk) -> Any:
    """A chat of the model with what it remembers, or reads now. Raises ValueError for bad input."""
    if (options.memory is None) == (options.read is None):
        raise ValueError("give either --memory, a folder, or --read, a file or folder of text")
    spans = {"content": options.content, "finder": options.finder, "passages": options.passages}
    if options.memory is not None:
        spans |= _checked(options, spans_in(options.memory))
    elif options.read is not None and not options.read.exists():
        raise ValueError(f"there is no file or folder {str(options.read)!r} to read")
    device = chosen_device(options.device)
    reader = open_reader(options.model, device, max_memories=None, dtype=None, index=None, spans=spans)
    memory: Any = reader.memory
    if options.memory is not None:
        reader.load(options.memory, mmap=True)
    else:
        memory.read(options.read)
    return memory.chat(system=options.system)


def _checked(options: Talk, saved: dict[str, Any] | None) -> dict[str, Any]:
    """How the memory in a folder was made. Raises ValueError for one of tokens, and for options that it cannot have."""
    if saved is None:
        raise ValueError(
            f"{str(options.memory)!r} holds a memory of tokens, which finds no passages: "
            "build one with `memory build`, or give --read"
        )
    if options.content is not None:
        raise ValueError("--content is for --read: a memory on disk keeps what it was built with")
    if options.finder is not None and "finder" in saved:
        raise ValueError("--finder is for --read and for memories of keys and values: this one keeps token ids alone")
    return saved


def answer(chat: Any, text: str, options: Talk) -> None:
    """Print the answer while it is written, then its sources."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show becomes a question mark
    stream = chat.say(text, stream=True, max_new_tokens=options.max_new_tokens)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    for number, source in enumerate(stream.sources, 1):
        print(f"[{number}] {source.title}, token {source.position:,}: {' '.join(source.text.split())}")
