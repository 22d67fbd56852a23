"""A document, and what gives documents. Knows no file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class TextDocument(NamedTuple):
    """A text that belongs together, read from its beginning to its end.

    split: where the corpus itself puts it; None: its name decides (split.py). Bytes of the text that are no UTF-8 are
    lone surrogates (PEP 383).
    """

    name: str
    text: str
    split: Split | None = None


class Corpus(Protocol):
    """Documents in an order that stays, one in memory at a time, as often as they are asked for.

    Reading raises ValueError for what is no text.
    """

    def __iter__(self) -> Iterator[TextDocument]: ...

    def fingerprint(self) -> str:
        """Something cheap that changes when the documents may have."""
