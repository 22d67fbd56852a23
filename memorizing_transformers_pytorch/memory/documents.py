"""The documents of a memory as a table."""

from __future__ import annotations

import html
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, SupportsIndex

from memorizing_transformers_pytorch.memory.knn_memory import KNNMemory
from memorizing_transformers_pytorch.memory.ledger import Document, Ledger
from memorizing_transformers_pytorch.memory.moving import held

COLUMNS = ("number", "title", "row", "tokens", "entries", "added", "bytes")


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
