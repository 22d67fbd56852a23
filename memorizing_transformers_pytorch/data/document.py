"""Documents, where they come from, and their text as bytes. Knows no file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class TextDocument(NamedTuple):
    """A text that is read from its beginning to its end.

    split: given by the corpus itself; None: the name decides (split.py). Bytes of the text that are not UTF-8 are lone
    surrogates (PEP 383).
    """

    name: str
    text: str
    split: Split | None = None


class Corpus(Protocol):
    """Documents in a fixed order, one in memory at a time; can be read several times.

    Reading raises ValueError for binary files.
    """

    def __iter__(self) -> Iterator[TextDocument]: ...

    def fingerprint(self) -> str:
        """Something cheap that changes when the documents may have."""


def decode(data: bytes, where: str, errors: Literal["replace", "strict"]) -> str:
    """UTF-8 to text, without the mark (BOM) that some write before it.

    Raises ValueError that names the place for other bytes, if errors is strict.
    """
    try:
        return data.decode("utf-8", errors).removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start:,}"
        raise ValueError(f"expected UTF-8 in {where}, got {found}") from error


def without_surrogates(text: str, where: str, errors: Literal["replace", "strict"]) -> str:
    """The text, if it can be written as UTF-8; escapes of JSON can name halves of characters, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise ValueError(f"expected UTF-8 in {where}, got {text[error.start]!r} at {error.start:,}") from error
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def text_bytes(text: str) -> bytes:
    """The bytes of a text, with those that were no UTF-8 as they were read."""
    return text.encode("utf-8", "surrogateescape")
