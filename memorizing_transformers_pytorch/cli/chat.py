"""`memorizing-transformers chat`: a conversation with a model about what it has read, with sources."""

from __future__ import annotations

import io
import sys
from typing import Any

from memorizing_transformers_pytorch.cli.models import chosen_device
from memorizing_transformers_pytorch.cli.options.chat import Talk
from memorizing_transformers_pytorch.library.readers import open_reader, spans_in

QUIT = "/quit"


def main(options: Talk) -> None:
    """Run `chat`. Raises ValueError for bad input."""
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
    if options.passages < 1:
        raise ValueError(f"--passages must be at least 1, got {options.passages}")
    spans = {"content": options.content, "finder": options.finder}
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
    return memory.chat(system=options.system, passages=options.passages)


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
