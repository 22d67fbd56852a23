"""What the layers of a model remember, together: the same rows, documents and tokens.

Shapes: R rows, N tokens, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memorizing_transformers_pytorch.huggingface.site import Reading, Site
from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList
from memorizing_transformers_pytorch.memory.disk.manifest import MOST_COUNTED
from memorizing_transformers_pytorch.memory.disk.save import Marks
from memorizing_transformers_pytorch.memory.ledger import Document, Ledger
from memorizing_transformers_pytorch.memory.policy import OLDEST
from memorizing_transformers_pytorch.utils.fingerprint import Writer

Pairs = tuple[Tensor, Tensor]
"""Keys and values (R, G, N, D)."""


KIND = "attached to a Hugging Face model"


class Kept(NamedTuple):
    """What is remembered while it is not in use: as in `Contents`, and which weights wrote it."""

    memories: list[list[KNNMemory]]
    ledger: Ledger
    marks: Marks | None
    offsets: Tensor
    writer: Writer | None


class Contents:
    """The memories of some layers. Either all of them change, or none."""

    def __init__(self, sites: list[Site], reading: Reading) -> None:
        self.sites, self.reading, self.ledger = sites, reading, Ledger()
        self._marks: Marks | None = None

    @property
    def num_rows(self) -> int:
        return self.sites[0].num_rows

    def make_rows(self, rows: int) -> None:
        """Have so many rows. Raises ValueError if there are others, and something is remembered."""
        if rows == self.num_rows:
            return
        if self.ledger:
            raise ValueError(f"expected the {self.num_rows} rows of what is remembered, got {rows}: clear() it first")
        made = [site.new_memories(rows) for site in self.sites]
        for site, memories in zip(self.sites, made, strict=True):
            site.use_memories(memories)
        self.reading.stand_at(torch.zeros(rows, dtype=torch.int64))

    def begin(self, titles: Sequence[str | None]) -> list[int]:
        """Begin a document in each row -> their numbers."""
        return [self.begin_in(row, title) for row, title in enumerate(titles)]

    def begin_in(self, row: int, title: str | None) -> int:
        """Begin a document in this row -> its number. Those of which nothing is remembered any more are struck out."""
        policy = self.sites[0].options.policy
        sites = self.sites[:1] if policy == OLDEST else self.sites  # other policies choose for each layer
        held = set().union(*(memory.documents_in(row) for site in sites for memory in site.memories))
        self.ledger.strike_out(row, held)
        self._let_grow_old([row])
        return self.ledger.begin(title, row, int(self.reading.offsets[row]))

    def rows_to_clear(self, rows: int | Iterable[int] | None) -> list[int]:
        """Which rows `clear` would empty. Raises ValueError for rows that there are not."""
        return self.sites[0].memories[0].rows_to_clear(rows)

    def clear(self, rows: int | Iterable[int] | None) -> None:
        """Forget what these rows hold, or all. Raises ValueError for rows that there are not."""
        cleared = self.rows_to_clear(rows)
        for site in self.sites:
            site.clear(cleared)
        self.ledger.forget(cleared)
        offsets = self.reading.offsets.clone()
        offsets[cleared] = 0
        self.reading.offsets = offsets

    def last_document(self) -> Document | None:
        """The document that was begun last in the only row, if it is there and has reached to where the row stands."""
        latest = self.ledger.latest(0) if self.num_rows == 1 else None
        known = None if latest is None else self.ledger[latest]
        return known if known and known.start + known.tokens == int(self.reading.offsets[0]) else None

    def memories(self) -> KNNMemoryList:
        """Those of all layers, one after the other, with the ledger."""
        memories = self._bare_memories()
        sizes = [len(site.memories) for site in self.sites]
        memories.extra = {"offsets": self.reading.offsets.tolist(), "memories": sizes, **self._arrangement()}
        return memories

    def _bare_memories(self) -> KNNMemoryList:
        return KNNMemoryList((memory for site in self.sites for memory in site.memories), self.ledger)

    def forget(self, document: int | str | Iterable[int | str] | None, where: Callable[[Document], bool] | None) -> int:
        """As `KNNMemoryList.forget`."""
        count = self.memories().forget(document, where=where)
        for site in self.sites:
            site.forget_last()
        self._let_grow_old(range(self.num_rows))
        return count

    def _let_grow_old(self, rows: Iterable[int]) -> None:
        """What stands too far behind where these rows are now."""
        for row in rows:
            for site in self.sites:
                site.let_grow_old(row, int(self.reading.offsets[row]))

    def save(self, path: str | Path, fingerprint: str | None, *, overwrite: bool, compact: bool) -> None:
        """As `KNNMemoryList.save`."""
        memories = self.memories()
        memories.fingerprint, memories.marks = fingerprint, self._marks
        memories.save(path, overwrite=overwrite, compact=compact)
        self._marks = memories.marks

    def _arrangement(self) -> dict[str, Any]:
        """Which layers have memories, and how what they hold is arranged."""
        return {
            "kind": KIND,
            "layers": [site.index for site in self.sites],
            "arranged": [site.arrangement for site in self.sites],
        }

    def use(self, loaded: KNNMemoryList) -> None:
        """Remember what was loaded instead. Raises ValueError, changing nothing, if it is not of such layers."""
        parts = self._parts_of(loaded)
        for site, memories in zip(self.sites, parts, strict=True):
            site.use_memories(memories)
        self.ledger, self._marks = loaded.ledger, loaded.marks
        self.reading.stand_at(torch.tensor(loaded.extra["offsets"]))

    def exchange(self, kept: Kept | None, writer: Writer | None) -> Kept:
        """Remember what was kept, or nothing; what was remembered until now."""
        if kept is None:
            empty = [site.new_memories(1) for site in self.sites]
            kept = Kept(empty, Ledger(), None, torch.zeros(1, dtype=torch.int64), None)
        offsets = self.reading.offsets
        memories = [site.exchange(each) for site, each in zip(self.sites, kept.memories, strict=True)]
        before = Kept(memories, self.ledger, self._marks, offsets, writer)
        self.ledger, self._marks = kept.ledger, kept.marks
        self.reading.stand_at(kept.offsets)
        return before

    def _parts_of(self, loaded: KNNMemoryList) -> list[list[KNNMemory]]:
        """The memories of each layer. Raises ValueError for those of other layers."""
        extra, own = loaded.extra, self._arrangement()
        if (got := {name: extra.get(name) for name in own}) != own:
            raise ValueError(f"expected a memory of {own}, got one of {got}")
        parts = [loaded[i : i + len(site.memories)] for i, site in zip(_starts(self.sites), self.sites, strict=True)]
        for site, memories in zip(self.sites, parts, strict=True):
            site.check_memories(memories)
        offsets = extra.get("offsets")
        counts = offsets if isinstance(offsets, list) else []
        if len(counts) != loaded[0].num_indices or not all(
            type(each) is int and 0 <= each < MOST_COUNTED for each in counts
        ):
            raise ValueError(f"expected how many tokens each row has read, got {offsets}")
        return parts

    def merge(self, loaded: KNNMemoryList) -> None:
        """Add what was loaded as if it had been read long ago. Raises ValueError as `use`, and for other rows."""
        parts = self._parts_of(loaded)
        if loaded[0].num_indices != self.num_rows or loaded[0].dtype != self.sites[0].memories[0].dtype:
            raise ValueError(f"expected {self.num_rows} rows and {self.sites[0].memories[0].dtype}, got {loaded[0]}")
        offsets, numbers = self.reading.offsets.tolist(), self.ledger.next_number
        for site, others in zip(self.sites, parts, strict=True):
            for row, places in enumerate(offsets):
                site.memories[-1].commit(site.carried_over(others, row, numbers, places))
        self.ledger.merge(loaded.ledger, offsets)
        self.reading.stand_at(self.reading.offsets + torch.tensor(loaded.extra["offsets"]))
        self._let_grow_old(range(self.num_rows))

    def store(self, pairs: list[Pairs | None], masks: list[Tensor], origins: list[Tensor]) -> None:
        """Remember, in each layer, pairs of the rows being read, where its mask (R, N) is True; origins (R, N, 3)."""
        staged = []
        for site, pair, mask, origin in zip(self.sites, pairs, masks, origins, strict=True):
            if pair is not None and bool(mask.any()):
                staged.append((site, site.stage(*pair, mask, origin)))
        with self._bare_memories().locked():
            for site, entries in staged:
                site.commit(entries)


def origins_of(numbers: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """Documents (R,), places in the row and tokens (R, N) -> (R, N, 3)."""
    return torch.stack((numbers[:, None].expand_as(tokens), places, tokens), dim=-1)


def _starts(sites: list[Site]) -> list[int]:
    """Where the memories of each site begin among those of all."""
    return [0, *accumulate(len(site.memories) for site in sites)][:-1]
