"""What the layers of a model remember, together: the same rows, documents and tokens.

Shapes: R rows, N tokens, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from memorizing_transformers_pytorch.huggingface.site import Reading, Site
from memorizing_transformers_pytorch.memory.ledger import Ledger

Pairs = tuple[Tensor, Tensor]
"""Keys and values (R, G, N, D)."""


class Contents:
    """The memories of some layers. Either all of them change, or none."""

    def __init__(self, sites: list[Site], reading: Reading) -> None:
        self.sites, self.reading, self.ledger = sites, reading, Ledger()

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
        self.ledger.strike_out(row, self.sites[0].oldest_place(row))
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

    def store(self, pairs: list[Pairs | None], masks: list[Tensor], origins: list[Tensor]) -> None:
        """Remember, in each layer, pairs of the rows being read, where its mask (R, N) is True; origins (R, N, 3)."""
        staged = []
        for site, pair, mask, origin in zip(self.sites, pairs, masks, origins, strict=True):
            if pair is not None and bool(mask.any()):
                staged.append((site, site.stage(*pair, mask, origin)))
        for site, entries in staged:
            site.commit(entries)


def origins_of(numbers: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """Documents (R,), places in the row and tokens (R, N) -> (R, N, 3)."""
    return torch.stack((numbers[:, None].expand_as(tokens), places, tokens), dim=-1)
