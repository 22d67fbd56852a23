"""What a look-up gives back, and how it stays what it was, for as long as somebody holds on to it.

A store is written in place. While there are leases on it, it copies entries to the end of a log before it changes them:
once, whatever the number of leases. A lease knows where the log ended when it began. Records that no lease can reach
any more are freed at once, as nothing refers to them.

A lease is held by a tensor, its token, so that whatever keeps tensors keeps leases: a result, or a graph that waits for
its backward pass, compiled or not. When the token is freed, as by `backward()`, the lease has ended.

Shapes: B rows, H query heads, T queries, K retrieved, D head width, N slots of a table, n entries.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.entries import Vectors


class Table(NamedTuple):
    """Keys and values (N, D), and where in them the retrieved entries lie: slots (B, H, T, K).

    mask (B, H, T, K) says which of the entries lie in this table; None for all of them.
    """

    keys: Vectors
    values: Vectors
    slots: Tensor
    mask: Tensor | None


class Changed(NamedTuple):
    """Entries as they were before a change: slots, keys and values for each head (G n, ...), numbers and origins of
    the entries themselves (n, ...)."""

    slots: Tensor
    keys: Vectors
    values: Vectors
    entries: Tensor
    origins: Tensor


class Record:
    """A place in the log: empty at its end, else a change and the place after it."""

    __slots__ = ("change", "next")

    def __init__(self) -> None:
        self.change: Changed | None = None
        self.next: Record | None = None


class Leased(Protocol):
    """What a lease needs of a store."""

    keys: Vectors
    values: Vectors
    lock: threading.RLock

    def origins_of(self, slots: Tensor) -> Tensor: ...

    def entries_of(self, slots: Tensor) -> Tensor: ...


class Log:
    """The changes of a store since the oldest lease on it began. Its users hold the lock of the store."""

    def __init__(self) -> None:
        self.end = Record()
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()

    @property
    def is_read(self) -> bool:
        """Whether any lease is held."""
        return len(self._leases) > 0

    def begin(self, store: Leased) -> Lease:
        """A lease on what the store holds now."""
        lease = Lease(store, self.end)
        self._leases.add(lease)
        return lease

    def append(self, change: Changed) -> None:
        self.end.change, self.end.next = change, Record()
        self.end = self.end.next


class Lease:
    """A state of a store, which can be read while the store changes."""

    def __init__(self, store: Leased, since: Record) -> None:
        self._store, self._since = store, since

    @property
    def lock(self) -> threading.RLock:
        """That of the store: whoever holds it is not disturbed by writers."""
        return self._store.lock

    def tables(self, slots: Tensor, mask: Tensor) -> list[Table]:
        """Where entries lie that were found in these slots: the store, and if some have changed, copies of those. They
        are good for as long as the caller holds the lock."""
        keys, values = self._store.keys.flatten(0, 2), self._store.values.flatten(0, 2)
        changes = list(self._changes())
        if not changes:
            return [Table(keys, values, slots, None)]
        at, moved = _first(torch.cat([each.slots for each in changes]), slots)
        moved &= mask.to(moved.device)
        kept_keys, kept_values = Vectors.cat([e.keys for e in changes]), Vectors.cat([e.values for e in changes])
        return [Table(keys, values, slots, ~moved), Table(kept_keys, kept_values, at.where(moved, 0), moved)]

    def copies(self, slots: Tensor, mask: Tensor) -> Table:
        """The entries that were found in these slots, each once, in a table of their own."""
        with self.lock:
            used, where = slots.to(self._store.keys.device).unique(return_inverse=True)  # type: ignore[no-untyped-call]
            store, *changed = self.tables(used, torch.ones_like(used, dtype=torch.bool))
            keys, values = store.keys.at(used), store.values.at(used)
        for kept in changed:
            assert kept.mask is not None
            at = torch.arange(len(used), device=used.device).where(~kept.mask, len(used) + kept.slots)
            keys, values = Vectors.cat([keys, kept.keys]).at(at), Vectors.cat([values, kept.values]).at(at)
        return Table(keys, values, where, None)

    def origins(self, slots: Tensor) -> Tensor:
        """slots (...) -> the origins (..., 3) of the entries that were there."""
        with self.lock:
            origins = self._store.origins_of(slots)
            if changes := list(self._changes()):
                at, moved = _first(torch.cat([each.entries for each in changes]), self._store.entries_of(slots))
                before = torch.cat([each.origins for each in changes])
                origins = torch.where(moved.unsqueeze(-1), before[at], origins)
        return origins

    def _changes(self) -> Iterator[Changed]:
        """Of the store since the lease began, the oldest first."""
        record = self._since
        while record.change is not None and record.next is not None:
            yield record.change
            record = record.next


def _first(kept: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted number first stands among kept ones (n,), and whether it does: what changed twice was at first
    what the lease has seen."""
    ordered, order = kept.sort(stable=True)
    at = torch.searchsorted(ordered, wanted.to(kept.device).contiguous()).clamp_max(len(kept) - 1)
    return order[at], ordered[at] == wanted.to(kept.device)


_numbers = itertools.count(1)
_held: dict[int, Lease] = {}


def token_for(lease: Lease) -> Tensor:
    """A tensor () int64 on the CPU: the lease is held until nothing refers to it any more."""
    number = next(_numbers)
    with torch.inference_mode(False):
        token = torch.tensor(number)
    _held[number] = lease
    # Views and detached copies of the token, as compiled graphs make them, share its storage.
    weakref.finalize(token.untyped_storage(), _held.pop, number, None).atexit = False
    return token


def lease_of(token: Tensor) -> Lease:
    """The lease that a token holds. Raises RuntimeError for a copy of a token that is gone."""
    lease = _held.get(int(token))
    if lease is None:
        raise RuntimeError("the look-up is over: keep its `lease` tensor itself, not a copy, as long as it is used")
    return lease


class Origin(NamedTuple):
    """Where an entry comes from; -1 where that is not known."""

    document: int
    position: int
    token: int


class Retrieved(NamedTuple):
    """The entries found for each query, best first; no copies of keys or values.

    slots: (rows, ..., K) int64. Where each entry lies in the memory: a slot names its row, key/value head and
        place in the ring, so it indexes `keys.flatten(0, 2)` of the store directly. 0 where nothing was found.
    scores: (rows, ..., K) float32 (float64 for float64 queries). The inner product of query and stored key;
        0 where nothing was found.
    mask: (rows, ..., K) bool. False where the row holds fewer than K entries.
    """

    slots: Tensor
    scores: Tensor
    mask: Tensor


class Lookup(NamedTuple):
    """A search result that keeps what it found: slots, scores and mask as of `Retrieved`, and a lease.

    lease: () int64. While it lives, the keys, values and origins behind the slots can be read as they were, whatever is
        added, forgotten or removed meanwhile, by any thread.
    """

    slots: Tensor
    scores: Tensor
    mask: Tensor
    lease: Tensor

    def tables(self) -> list[Table]:
        """Copies of the keys and values behind the slots, each once: one table, whose slots are places in it."""
        return [lease_of(self.lease).copies(self.slots, self.mask)]

    def origins(self) -> Tensor:
        """(B, H, T, K, 3) int64: document id, position, token id of each entry; -1 where nothing was found."""
        return lease_of(self.lease).origins(self.slots).to(self.mask.device).masked_fill(~self.mask.unsqueeze(-1), -1)
