"""Which documents the rows of a memory hold.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch
from torch import Tensor

ENDED = "ended"  # in `about` of a document that is not continued: a later one of its row was forgotten


@dataclass(frozen=True)
class Document:
    """A text that was read into a row of a memory, and how many tokens of it.

    start: how many tokens were read into the row before. added: when reading began (ISO 8601, UTC). about: whatever
    else is worth knowing, such as the file.
    """

    number: int
    title: str
    row: int
    tokens: int
    start: int
    added: str = ""
    about: Mapping[str, str] = field(default_factory=dict)


class Ledger:
    """The documents of each row, in the order in which they were begun. A number is never given twice."""

    def __init__(self, documents: Iterable[Document] = (), next_number: int = 0) -> None:
        self._documents = {each.number: each for each in documents}
        self.next_number = max([next_number, *(number + 1 for number in self._documents)])
        self.cleared = set[int]()  # not listed: their rows were cleared, and nothing of them was stored since

    def __bool__(self) -> bool:
        return any(each.tokens and number not in self.cleared for number, each in self._documents.items())

    def __contains__(self, number: int) -> bool:
        return number in self._documents and number not in self.cleared

    def __getitem__(self, number: int) -> Document:
        return self._documents[number]

    @property
    def numbers(self) -> list[int]:
        """The numbers of all documents, listed or not."""
        return list(self._documents)

    def begin(self, title: str | None, row: int, start: int, about: Mapping[str, str] | None = None) -> int:
        """Enter a document -> its number. It is listed when it grows."""
        number, self.next_number = self.next_number, self.next_number + 1
        added = datetime.now(UTC).isoformat(timespec="seconds")
        self._documents[number] = Document(number, title or f"document {number}", row, 0, start, added, about or {})
        return number

    def grow(self, number: int, tokens: int) -> None:
        """`tokens` more tokens of a document were read. Ignored for one that was forgotten; one of which nothing was
        read is dropped."""
        known = self._documents.get(number)
        if known is not None and known.tokens + tokens:
            self._documents[number] = replace(known, tokens=known.tokens + tokens)
        else:
            self._drop([number])

    def note(self, number: int, about: Mapping[str, str]) -> None:
        """Add to what is known about a document."""
        known = self._documents[number]
        self._documents[number] = replace(known, about={**known.about, **about})

    def clear(self, rows: Iterable[int]) -> None:
        """These rows were emptied. Their documents are no longer listed, unless entries of them are stored again: a
        document that is being read may clear its own row."""
        cleared = set(rows)
        self.cleared |= {number for number, each in self._documents.items() if each.row in cleared}

    def note_stored(self, numbers: Iterable[int]) -> None:
        """Entries of these documents were stored: list them again, and drop cleared ones that came before them."""
        for each in [self._documents[number] for number in numbers if number in self._documents]:
            self.cleared.discard(each.number)
            self._drop(n for n in list(self.cleared) if n < each.number and self._documents[n].row == each.row)

    def prune(self, row: int, held: Collection[int]) -> None:
        """Drop documents of this row that have no entries left, except the last one, which may be continued."""
        last = self.latest(row)
        own = [number for number, each in self._documents.items() if each.row == row]
        self._drop(n for n in own if n not in held and (n != last or not self._documents[n].tokens))

    def forget_documents(self, numbers: Iterable[int]) -> None:
        """Drop these documents. If the last one of a row is among them, what comes next in the row is a new one."""
        last = {row: self._last_in(row) for row in {each.row for each in self._documents.values()}}
        self._drop(numbers)
        for row, number in last.items():
            if number not in self._documents and (left := self._last_in(row)) is not None:
                self.note(left, {ENDED: "yes"})

    def _drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._documents.pop(number, None)
            self.cleared.discard(number)

    def _last_in(self, row: int) -> int | None:
        return next((number for number, each in reversed(self._documents.items()) if each.row == row), None)

    def latest(self, row: int) -> int | None:
        """The document of this row that can be continued: the one begun last, unless it was cleared or forgotten."""
        number = self._last_in(row)
        ended = number is None or number in self.cleared or ENDED in self._documents[number].about
        return None if ended else number

    @property
    def last(self) -> Document:
        """The document that was begun last, listed or not."""
        return next(reversed(self._documents.values()))

    def in_documents(self, origins: Tensor) -> Tensor:
        """Origins (..., 3) with positions in a row -> with positions in their documents."""
        numbers, starts = torch.tensor(
            [(-1, 0), *((number, self._documents[number].start) for number in sorted(self._documents))],
            device=origins.device,
        ).T.contiguous()
        which = torch.searchsorted(numbers, origins[..., 0].contiguous()).clamp_max(len(numbers) - 1)
        shift = torch.where(numbers[which] == origins[..., 0], starts[which], 0)
        return torch.stack((origins[..., 0], origins[..., 1] - shift, origins[..., 2]), dim=-1)

    def documents(self) -> list[Document]:
        """The documents of which something was read, without cleared ones."""
        return [each for number, each in self._documents.items() if each.tokens and number not in self.cleared]

    def merge(self, other: Ledger, offsets: Sequence[int] | None = None) -> int:
        """Enter the documents of another ledger. offsets: tokens that were read into each row before them.

        Returns what is added to their numbers.
        """
        shift = self.next_number
        for each in other.documents():
            start = each.start + (0 if offsets is None else offsets[each.row])
            self._documents[each.number + shift] = replace(each, number=each.number + shift, start=start)
        self.next_number += other.next_number
        return shift
