"""Which documents the rows of a memory hold.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch
from torch import Tensor


@dataclass(frozen=True)
class Document:
    """What was read: its number, title, row of the memory and how many tokens it had.

    start: how many tokens were read into the row before. added: when it was begun (ISO 8601, UTC). about: whatever else
    is worth knowing of it, such as the file that it was.
    """

    number: int
    title: str
    row: int
    tokens: int
    start: int
    added: str = ""
    about: Mapping[str, str] = field(default_factory=dict)


class Ledger:
    """The documents of each row, in the order in which they were begun.

    Numbers are never given twice, also to documents that were forgotten.
    """

    def __init__(self, documents: Iterable[Document] = (), next_number: int = 0) -> None:
        self._documents = {each.number: each for each in documents}
        self.next_number = max((number + 1 for number in self._documents), default=0)
        self.next_number = max(self.next_number, next_number)
        self._broken_off: set[int] = set()  # rows whose last document was forgotten: none goes on there

    def __bool__(self) -> bool:
        return any(each.tokens for each in self._documents.values())

    def __contains__(self, number: int) -> bool:
        return number in self._documents

    def __getitem__(self, number: int) -> Document:
        return self._documents[number]

    def begin(self, title: str | None, row: int, start: int, about: Mapping[str, str] | None = None) -> int:
        """Enter a document -> its number. Until it grows it is not listed."""
        number, self.next_number = self.next_number, self.next_number + 1
        self._broken_off.discard(row)
        added = datetime.now(UTC).isoformat(timespec="seconds")
        self._documents[number] = Document(number, title or f"document {number}", row, 0, start, added, about or {})
        return number

    def strike_out(self, row: int, held: Collection[int]) -> None:
        """Forget documents of this row of which nothing is held any more, but the last one, which may go on."""
        own = [number for number, each in self._documents.items() if each.row == row]
        for i, number in enumerate(own):
            goes_on = i == len(own) - 1 and self._documents[number].tokens
            if number not in held and not goes_on:
                del self._documents[number]

    def grow(self, number: int, tokens: int) -> None:
        """So many tokens more of a document were read."""
        known = self._documents[number]
        self._documents[number] = replace(known, tokens=known.tokens + tokens)

    def note(self, number: int, about: Mapping[str, str]) -> None:
        """Know this of a document too."""
        known = self._documents[number]
        self._documents[number] = replace(known, about={**known.about, **about})

    def forget(self, rows: Iterable[int]) -> None:
        """Strike out what these rows held."""
        cleared = set(rows)
        self._documents = {number: each for number, each in self._documents.items() if each.row not in cleared}

    def forget_documents(self, numbers: Iterable[int]) -> None:
        """Strike out these documents, where they are known."""
        for number in numbers:
            if number in self._documents:
                row = self._documents[number].row
                if number == self.latest(row):
                    self._broken_off.add(row)
                del self._documents[number]

    def latest(self, row: int) -> int | None:
        """The number of the document of this row that was begun last; None if it was forgotten."""
        if row in self._broken_off:
            return None
        numbers = [number for number, each in self._documents.items() if each.row == row]
        return numbers[-1] if numbers else None

    def in_documents(self, origins: Tensor) -> Tensor:
        """Origins (..., 3) with places in a row -> with positions in their documents."""
        numbers, starts = torch.tensor(
            [(-1, 0), *((number, self._documents[number].start) for number in sorted(self._documents))],
            device=origins.device,
        ).T.contiguous()
        which = torch.searchsorted(numbers, origins[..., 0].contiguous()).clamp_max(len(numbers) - 1)
        shift = torch.where(numbers[which] == origins[..., 0], starts[which], 0)
        return torch.stack((origins[..., 0], origins[..., 1] - shift, origins[..., 2]), dim=-1)

    def documents(self) -> list[Document]:
        """Those of which something was read."""
        return [each for each in self._documents.values() if each.tokens]

    def copy(self) -> Ledger:
        """Another one that says the same."""
        return Ledger(self._documents.values(), self.next_number)

    def merge(self, other: Ledger, offsets: Sequence[int] | None = None) -> int:
        """Enter the documents of another, with later numbers, and read so much later in their rows; by how much numbers
        are later."""
        shift = self.next_number
        for each in list(other._documents.values()):
            start = each.start + (0 if offsets is None else offsets[each.row])
            self._documents[each.number + shift] = replace(each, number=each.number + shift, start=start)
        self.next_number += other.next_number
        return shift
