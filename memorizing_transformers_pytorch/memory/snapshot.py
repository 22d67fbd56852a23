"""The ring of every row as tensors on the CPU, and back: exactly what is remembered, and what is overwritten next.

Shapes: R rows, G key/value heads, N entries of all rows one after the other (each in its places), D head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.checks import NonFiniteError
from memorizing_transformers_pytorch.memory.entries import PER_HEAD
from memorizing_transformers_pytorch.memory.store import Store

OBSOLETE = {"written", "clock"}  # parts that older versions saved; ignored


def take_snapshot(store: Store) -> dict[str, Tensor]:
    """keys, values (G, N, D), their scales (G, N) if they are codes, origins (N, 3), filled (R,), cursors (R,) and
    capacity ()."""
    rows = list(enumerate(store.filled))
    return {
        **{
            name: torch.cat([table[row].narrow(_dim(name), 0, filled).cpu() for row, filled in rows], _dim(name))
            for name, table in store.tables.items()
        },
        "filled": torch.tensor(store.filled),
        "cursors": torch.tensor(store.cursors),
        "capacity": torch.tensor(store.capacity),
    }


def _dim(name: str) -> int:
    """Which dimension of one row of a table of that name, and of what is saved of it, counts entries."""
    return int(name in PER_HEAD)


def restored(like: Store, snapshot: Mapping[str, Tensor]) -> Store:
    """A new store, of the same kind as `like`, that holds what a snapshot says.

    Raises ValueError for snapshots of another shape, dtype or capacity, or that no memory can have made.
    """
    snapshot = {name: part for name, part in snapshot.items() if name not in OBSOLETE}
    _check_parts(like, snapshot)
    _check_numbers(like, snapshot)
    new = like.empty_like()
    new.filled, new.cursors = snapshot["filled"].tolist(), snapshot["cursors"].tolist()
    new.written_to = list(new.filled)
    for name, table in new.tables.items():
        for row, part in enumerate(snapshot[name].split_with_sizes(new.filled, _dim(name))):
            table[row].narrow(_dim(name), 0, new.filled[row]).copy_(part)
    return new


def _check_parts(like: Store, snapshot: Mapping[str, Tensor]) -> None:
    rows = like.sizes.rows
    count = int(snapshot["filled"].sum()) if "filled" in snapshot else 0
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        **{name: (dtype, shape[1:]) for name, (shape, dtype) in like.sizes.tables(count).items()},
        "filled": (torch.int64, (rows,)),
        "cursors": (torch.int64, (rows,)),
        "capacity": (torch.int64, ()),
    }
    got = {name: (part.dtype, tuple(part.shape)) for name, part in snapshot.items()}
    for name in [*expected, *got]:
        if expected.get(name) != got.get(name):
            raise ValueError(f"expected {name!r} of a memory's state as {expected.get(name)}, got {got.get(name)}")


def _check_numbers(like: Store, snapshot: Mapping[str, Tensor]) -> None:
    capacity = int(snapshot["capacity"])
    if capacity != like.capacity:
        raise ValueError(f"expected the state of a memory with capacity {like.capacity}, got {capacity}")
    for filled, cursor in zip(snapshot["filled"].tolist(), snapshot["cursors"].tolist(), strict=True):
        cursor_fits = 0 <= cursor < capacity if filled == capacity else cursor == filled
        if not 0 <= filled <= capacity or not cursor_fits:
            raise ValueError(f"expected rows of up to {capacity} entries in turn, got {filled}, the next at {cursor}")
    if not all(bool(part.isfinite().all()) for part in snapshot.values()):
        raise NonFiniteError("expected finite keys and values in a memory's state, got NaN or infinity")
