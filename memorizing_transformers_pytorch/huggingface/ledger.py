"""Which documents the rows of a memory hold.

Shapes: R rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
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
        return any(each.tokens for each in self._documents.values())

    def begin(self, title: str | None, row: int, start: int) -> int:
        """Enter a document -> its number. Until it grows it is not listed."""
        number = next(self._numbers)
        self._documents[number] = Document(number, title or f"document {number}", row, 0, start)
        return number

    def strike_out(self, row: int, oldest: int) -> None:
        """Forget documents of this row that are empty, or end before its oldest entry, at this place."""
        for number, each in list(self._documents.items()):
            if each.row == row and (each.tokens == 0 or each.start + each.tokens <= oldest):
                del self._documents[number]

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
        numbers, starts = torch.tensor(
            [(-1, 0), *((number, each.start) for number, each in self._documents.items())], device=origins.device
        ).T.contiguous()
        which = torch.searchsorted(numbers, origins[..., 0].contiguous()).clamp_max(len(numbers) - 1)
        shift = torch.where(numbers[which] == origins[..., 0], starts[which], 0)
        return torch.stack((origins[..., 0], origins[..., 1] - shift, origins[..., 2]), dim=-1)

    def documents(self) -> list[Document]:
        """Those of which something was read."""
        return [each for each in self._documents.values() if each.tokens]
