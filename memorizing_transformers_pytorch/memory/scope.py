"""Which rows of a memory batches consist of: all, or those of a scope, which belongs to the thread that entered it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from memorizing_transformers_pytorch.memory.checks import checked_rows
from memorizing_transformers_pytorch.utils.context import PerContext


class Scope:
    """The rows of a memory, some of which are in scope."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._chosen: PerContext[list[int] | None] = PerContext(None)

    @property
    def rows(self) -> list[int]:
        """Those of the innermost scope that this thread is in, else all."""
        chosen = self._chosen.now
        return list(range(self._num_rows)) if chosen is None else chosen

    @contextmanager
    def at(self, rows: Iterable[int]) -> Iterator[None]:
        """Inside, these rows. Raises ValueError for rows that do not fit, or none."""
        chosen = checked_rows(rows, self._num_rows)
        if not chosen:
            raise ValueError("expected at least one row in the scope, got none")
        with self._chosen.at(chosen):
            yield

    def checked(self, rows: int | Iterable[int] | None) -> list[int]:
        """Rows as a list; those in scope for None. Raises ValueError for rows outside the scope."""
        if rows is None:
            return self.rows
        chosen = checked_rows(rows if isinstance(rows, Iterable) else [rows], self._num_rows)
        if not set(chosen) <= set(self.rows):
            raise ValueError(f"expected rows of the scope {self.rows}, got {chosen}")
        return chosen
