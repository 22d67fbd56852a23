"""Which rows of a memory batches consist of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

from memorizing_transformers_pytorch.memory import checks


class Scoped:
    """Something with rows, some of which are in scope. num_indices: how many there are. scoped_indices: those."""

    def __init__(self, num_indices: int) -> None:
        self.num_indices = num_indices
        self.scoped_indices = list(range(num_indices))

    @contextmanager
    def at_batch_indices(self, indices: Iterable[int]) -> Iterator[Self]:
        """Inside, batches consist of just these rows, in this order, and no other row changes.

        Row numbers are always those of the whole memory: an inner scope replaces the outer one until it ends.
        Raises ValueError for rows that are out of range, repeated or none.
        """
        rows = checks.checked_rows(indices, self.num_indices)
        if not rows:
            raise ValueError("expected at least one row in the scope, got none")
        outer, self.scoped_indices = self.scoped_indices, rows
        try:
            yield self
        finally:
            self.scoped_indices = outer

    def rows_to_clear(self, batch_indices: int | Iterable[int] | None = None) -> list[int]:
        """Check which rows `clear` would empty, emptying none: several memories can so change all or none."""
        if batch_indices is None:
            batch_indices = self.scoped_indices
        elif not isinstance(batch_indices, Iterable):
            batch_indices = [batch_indices]
        rows = checks.checked_rows(batch_indices, self.num_indices)
        if not set(rows) <= set(self.scoped_indices):
            raise ValueError(f"expected rows of the scope {self.scoped_indices}, got {rows}")
        return rows
