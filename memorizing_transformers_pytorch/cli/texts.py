"""Texts that commands read, and print as they are written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from memorizing_transformers_pytorch.data.document import decode
from memorizing_transformers_pytorch.data.texts import files_below, text_of
from memorizing_transformers_pytorch.data.tokenizer import Tokenizer
from memorizing_transformers_pytorch.library.build import evicted_since, held_titles, room_messages
from memorizing_transformers_pytorch.library.readers import DocumentReader
from memorizing_transformers_pytorch.utils.progress import bar

STDIN = "-"
MORE_ROOM = " (--max-memories, for a new memory)"  # the remedy where documents were evicted


def read_text(name: str) -> str:
    """A file, or standard input, as text. Raises ValueError if there is none or it is not in UTF-8."""
    if name != STDIN and not Path(name).is_file():
        raise ValueError(f"expected a text file to read, got {name!r}, which is a folder or does not exist")
    data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    where = "standard input" if name == STDIN else repr(name)
    if b"\0" in data:
        raise ValueError(f"expected text to read, got {where}, which is binary")
    return decode(data, where, "strict")


def texts_of(sources: Sequence[str], pattern: str) -> dict[str, str]:
    """The texts of files, by their names. A file below a folder that holds no text is skipped with a message; raises
    ValueError for such a file that was named itself."""
    given, texts = set(map(Path, sources)), dict[str, str]()
    for path in files_below(sources, pattern):
        try:
            texts[str(path)] = text_of(path.read_bytes(), str(path))
        except (OSError, ValueError) as error:
            if path in given:
                raise
            print(f"skipped {error}", file=sys.stderr)
    return texts


def read_all(reader: DocumentReader, texts: dict[str, str]) -> None:
    """Read texts by their names, with a progress bar; then say which of them the memory does not hold."""
    held, too_short = held_titles(reader.memory), list[str]()
    with bar(total=sum(map(len, texts.values())), desc="reading", unit_scale=True, disable=not texts) as progress:
        for name, text in texts.items():
            done = 0.0
            for part in reader.read(name, text, {}, None):
                progress.update((part - done) * len(text))
                done = part
            document = reader.memory.ledger.last
            if reader.remembers(document.tokens):
                held[document.number] = name
            else:
                too_short.append(name)
    for line in room_messages(too_short, evicted_since(held, reader.memory), MORE_ROOM):
        print(line, file=sys.stderr)


def pieces(written: Iterator[int | None], before: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of tokens as they come, in whole characters; `before` are the tokens that they follow."""
    context, pending, piece = list(before[-1:]), list[int](), ""
    for token in written:
        if token is None:
            continue
        pending.append(token)
        # What the tokens add to those before them: some tokenizers write the first token of a text differently.
        piece = tokenizer.decode(context + pending)[len(tokenizer.decode(context)) :]
        if piece and not piece.endswith("\N{REPLACEMENT CHARACTER}"):  # else wait for the rest of a character
            yield piece
            context, pending, piece = pending, [], ""
    if piece:
        yield piece
