"""Which documents the rows of a memory hold.

Shapes: R rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Document:
    """What was read: its number, title, row of the memory and how many tokens it had.

    start: how many tokens were read into the row before.
    """

    number: int
    title: str
    row: int
    tokens: int
    start: int


class Ledger:
    """The documents of each row, in the order in which they were begun."""

    def __init__(self) -> None:
        self._documents: dict[int, Document] = {}
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        return bool(self.documents())

    def begin(self, titles: Iterable[str | None], rows: Iterable[int], starts: Iterable[int]) -> list[int]:
        """Enter a document for each of these rows -> their numbers. Until they grow they are not listed."""
        numbers = []
        for title, row, start in zip(titles, rows, starts, strict=True):
            number = next(self._numbers)
            self._documents[number] = Document(number, title or f"document {number}", row, 0, start)
            numbers.append(number)
        return numbers

    def grow(self, number: int, tokens: int) -> None:
        """So many tokens more of a document were read."""
        known = self._documents[number]
        self._documents[number] = replace(known, tokens=known.tokens + tokens)

    def forget(self, rows: Iterable[int]) -> None:
        """Strike out what these rows held."""
        cleared = set(rows)
        self._documents = {number: each for number, each in self._documents.items() if each.row not in cleared}

    def latest(self, row: int) -> int | None:
        """The number of the document of this row that was begun last."""
        numbers = [number for number, each in self._documents.items() if each.row == row]
        return numbers[-1] if numbers else None

    def in_documents(self, origins: Tensor) -> Tensor:
        """Origins (..., 3) with places in a row -> with positions in their documents."""
        origins = origins.clone()
        for number, document in self._documents.items():
            origins[..., 1] -= document.start * (origins[..., 0] == number)
        return origins

    def documents(self) -> list[Document]:
        """Those of which something was read."""
        return [each for each in self._documents.values() if each.tokens]
