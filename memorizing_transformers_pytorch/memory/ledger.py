"""Which documents the rows of a memory hold, and a table of them.

Shapes: R rows.
"""

from __future__ import annotations

import html
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.knn_memory import KNNMemory

COLUMNS = ("number", "title", "row", "tokens", "entries", "added", "bytes")
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


@dataclass(frozen=True)
class Remembered(Document):
    """A document and its entries. entries: how many in each layer. bytes: their size."""

    entries: tuple[int, ...] = ()
    bytes: int = 0


class DocumentTable(list[Remembered]):
    """Documents in the order in which they were read. Printed as a table; `to_pandas()` makes a data frame."""

    def to_dicts(self) -> list[dict[str, Any]]:
        """A dict for each, as for JSON."""
        return [asdict(each) for each in self]

    def to_pandas(self) -> Any:
        """A pandas.DataFrame, if pandas is installed."""
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        return pd.DataFrame(self.to_dicts())

    def __str__(self) -> str:
        lines = [COLUMNS, *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(row.rstrip() for row in rows)

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        return "<table>" + line(COLUMNS, "th") + "".join(line(cells, "td") for cells in self._cells()) + "</table>"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                str(each.number),
                each.title,
                str(each.row),
                f"{each.tokens:,}",
                _range(each.entries),
                each.added,
                f"{each.bytes:,}",
            )
            for each in self
        ]


def _range(counts: tuple[int, ...]) -> str:
    least, most = min(counts, default=0), max(counts, default=0)
    return f"{most:,}" if least == most else f"{least:,}-{most:,}"


def by_layer(numbers: Sequence[int], of_layers: Sequence[int]) -> tuple[int, ...]:
    """One number for each memory -> their sum for each layer. of_layers: how many memories each layer has."""
    left = iter(numbers)
    return tuple(sum(islice(left, size)) for size in of_layers)


def document_table(memories: Sequence[KNNMemory], ledger: Ledger, of_layers: Sequence[int]) -> DocumentTable:
    """The documents of the ledger, and those that only entries know (with as many tokens as entries).

    of_layers: how many memories each layer has.
    """
    counts = [_counts(memory) for memory in memories]
    known = {each.number: each for each in ledger.documents()}
    for number, row in sorted({key for each in counts for key in each if key[0] >= 0}):
        if number not in known:
            tokens = max(each.get((number, row), 0) for each in counts)
            known[number] = Document(number, f"document {number}", row, tokens, 0)
    table = DocumentTable()
    for each in known.values():
        entries = tuple(sum(n for (number, _), n in count.items() if number == each.number) for count in counts)
        size = sum(n * memory.store.sizes.bytes_per_entry for n, memory in zip(entries, memories, strict=True))
        table.append(Remembered(**vars(each), entries=by_layer(entries, of_layers), bytes=size))
    return table


def _counts(memory: KNNMemory) -> dict[tuple[int, int], int]:
    """How many entries of each document each row holds, by number and row."""
    found: dict[tuple[int, int], int] = {}
    for row, filled in enumerate(memory.store.filled):
        numbers, counts = memory.store.origins[row, :filled, 0].unique(return_counts=True)  # type: ignore[no-untyped-call]
        found |= {(number, row): n for number, n in zip(numbers.tolist(), counts.tolist(), strict=True)}
    return found


def known_numbers(documents: Any, memories: Sequence[KNNMemory], ledger: Ledger) -> list[int]:
    """Numbers and titles of documents, one or several -> their numbers. Raises ValueError for unknown ones."""
    alone = isinstance(documents, str) or not isinstance(documents, Iterable)
    titles: dict[str, list[int]] = {}
    for each in ledger.documents():
        titles.setdefault(each.title, []).append(each.number)
    there = held(memories) | {*ledger.numbers}
    numbers: list[int] = []
    for one in [documents] if alone else documents:
        if isinstance(one, str) and one not in titles:
            raise ValueError(f"no document is titled {one!r}; there are {list(titles)[:20]}")
        if not isinstance(one, str | SupportsIndex) or isinstance(one, bool):
            raise ValueError(f"documents are chosen by number or title, got {one!r}")
        numbers += titles[one] if isinstance(one, str) else [operator.index(one)]
    if unknown := [number for number in numbers if number not in there]:
        raise ValueError(f"the memory has no document {', '.join(map(str, unknown))}")
    return numbers


def held(memories: Sequence[KNNMemory]) -> set[int]:
    """The numbers of the documents with entries in any row."""
    return {
        number
        for memory in memories
        for row in range(memory.num_indices)
        for number in memory.store.numbers_in(row).tolist()
    }
