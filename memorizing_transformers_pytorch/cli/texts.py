"""Texts that commands read, and print as they are written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from memorizing_transformers_pytorch.data.document import decode
from memorizing_transformers_pytorch.data.tokenizer import Tokenizer

STDIN = "-"


def read_text(name: str) -> str:
    """A file, or standard input, as text. Raises ValueError if there is none or it is not in UTF-8."""
    if name != STDIN and not Path(name).is_file():
        raise ValueError(f"expected a text file to read, got {name!r}, which is a folder or does not exist")
    data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    where = "standard input" if name == STDIN else repr(name)
    if b"\0" in data:
        raise ValueError(f"expected text to read, got {where}, which is binary")
    return decode(data, where, "strict")


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
