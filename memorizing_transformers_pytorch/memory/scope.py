"""Which rows of a memory batches consist of: all, or those of a scope, which belongs to the thread that entered it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from memorizing_transformers_pytorch.memory.checks import checked_rows
from memorizing_transformers_pytorch.utils.context import current, setting


def rows_in_scope(memory: object, num_rows: int) -> list[int]:
    """The rows of the innermost scope of this memory, else all."""
    rows: list[int] | None = current(memory, "rows")
    return list(range(num_rows)) if rows is None else rows


@contextmanager
def scope(memory: object, rows: Iterable[int], num_rows: int) -> Iterator[None]:
    """Inside, batches of this thread consist of these rows. Raises ValueError for rows that do not fit, or none."""
    chosen = checked_rows(rows, num_rows)
    if not chosen:
        raise ValueError("a scope needs at least one row")
    with setting(memory, "rows", chosen):
        yield


def checked_scoped_rows(memory: object, rows: int | Iterable[int] | None, num_rows: int) -> list[int]:
    """Rows as a list; those in scope for None. Raises ValueError for rows outside the scope."""
    in_scope = rows_in_scope(memory, num_rows)
    if rows is None:
        return in_scope
    chosen = checked_rows(rows if isinstance(rows, Iterable) else [rows], num_rows)
    if not set(chosen) <= set(in_scope):
        raise ValueError(f"expected rows of the scope {in_scope}, got {chosen}")
    return chosen
