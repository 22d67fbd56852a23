"""KNNMemory: what one layer remembers of the documents in its rows.

It checks what comes in, keeps it in a `Store` and finds it again with an `Index`. It knows nothing of models.

Shapes: R rows in scope, H query heads, G key/value heads, N entries added, K retrieved, D head width, M capacity.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import checks
from memorizing_transformers_pytorch.memory.entries import Sizes, StagedEntries, staged
from memorizing_transformers_pytorch.memory.index.auto import make_index
from memorizing_transformers_pytorch.memory.index.exact import Index, recall_of
from memorizing_transformers_pytorch.memory.index.structure import some
from memorizing_transformers_pytorch.memory.lease import Lookup, Origin, Retrieved, token_for
from memorizing_transformers_pytorch.memory.policy import BY_DOCUMENT, OLDEST, POLICIES, of_oldest_documents
from memorizing_transformers_pytorch.memory.search import Hidden, number_for, search_rows, traced_look_up, without_rows
from memorizing_transformers_pytorch.memory.snapshot import restored, take_snapshot
from memorizing_transformers_pytorch.memory.store import Store
from memorizing_transformers_pytorch.utils.context import PerContext

Rows = Sequence[int] | None
"""Row numbers, instead of those in scope."""


class KNNMemory(AbstractContextManager["KNNMemory"]):
    """A memory of (key, value) pairs for each row, searched by largest inner product (Wu et al., ICLR 2022, section 3).

    Each row keeps the last `max_memories` entries added since it was last cleared (unless `policy` says otherwise).

    dim: width D of keys and values. max_memories: capacity M of each row.
    num_indices: number of rows; each remembers its own document.
    num_kv_heads: key/value heads G. Query head h reads key/value head h // (H / G).
    dtype: of stored keys and values: torch.float32, bfloat16, float16, or int8 for codes with a scale for each vector
        (see `entries`), a quarter of float32, which are what is searched and attended to.
    device: where they lie; the CPU unless given.
    index: "exact", brute force over the stored keys; "auto", which uses inverted lists in large rows where they find
        95% of the best entries; or inverted lists such as "IVF1024,SQfp16" (see `index.structure.Kind`), which need a
        CPU. "auto" is exact on a GPU. `index_in_use` says what searches.
    directory: keep the entries in memory-mapped files in a fresh folder below this one, instead of in RAM. `cleanup()`
        and the end of a `with` block remove the files.
    policy: what is evicted from a full row: "oldest", the oldest entries; or "by-document", the whole oldest document.
    memmap_filename, multiprocessing: of the original package. The first only chooses the directory; both warn once.
    Several threads may use it: each call sees the memory before or after any other. A scope belongs to the thread (or
    task) that entered it. A pickle carries entries in RAM by value, and those in files by the paths of these.
    `seconds_searching` adds up the time that look-ups took. `searcher` is the `Index`: it may be exchanged.
    Raises ValueError for sizes below 1, another dtype, an unknown index, or a directory or faiss index with a GPU.
    """

    def __init__(
        self,
        dim: int,
        max_memories: int = 16000,
        num_indices: int = 1,
        memmap_filename: str | Path | None = None,
        multiprocessing: bool | None = None,
        *,
        num_kv_heads: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        index: str = "exact",
        directory: str | Path | None = None,
        policy: str = OLDEST,
    ) -> None:
        sizes = {"dim": dim, "max_memories": max_memories, "num_indices": num_indices, "num_kv_heads": num_kv_heads}
        directory = checks.directory_of(directory, memmap_filename, multiprocessing)
        self.device = torch.device(device or "cpu")
        checks.check_options(sizes, dtype, self.device, index, mapped=directory is not None)
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
        self.dim, self.max_memories, self.num_indices, self.num_kv_heads = sizes.values()
        self.dtype, self.index, self.policy = dtype, index, policy
        self._scope: PerContext[list[int] | None] = PerContext(None)
        self.hidden: PerContext[Hidden | None] = PerContext(None)  # what this thread must not find
        self.seconds_searching, self._number = 0.0, number_for(self)
        self.searcher: Index = make_index(index, dim, self.device)
        sized = Sizes(num_indices, num_kv_heads, max_memories, dim, dtype)
        self._open_store: Store | None = Store(sized, self.device, directory)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "searcher"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.searcher, self._number = make_index(self.index, self.dim, self.device), number_for(self)

    def __repr__(self) -> str:
        names = ("dim", "max_memories", "num_indices", "num_kv_heads", "dtype", "index")
        entries = "closed" if self.is_closed else list(self.num_entries)
        return f"KNNMemory({', '.join(f'{name}={getattr(self, name)!r}' for name in names)}, entries={entries})"

    @property
    def store(self) -> Store:
        """The entries themselves. Raises ValueError after `cleanup()`."""
        if self._open_store is None:
            raise ValueError("expected an open memory, got one that was closed by cleanup()")
        return self._open_store

    @property
    def num_entries(self) -> tuple[int, ...]:
        """How many entries each row holds, of all rows."""
        return tuple(self.store.filled)

    @property
    def index_in_use(self) -> str:
        """What searches, in words: the structure, how far it looks, and its recall as measured last."""
        return self.searcher.description

    @property
    def scoped_indices(self) -> list[int]:
        """The rows that batches consist of: all, unless inside `at_batch_indices`."""
        chosen = self._scope.now
        return list(range(self.num_indices)) if chosen is None else chosen

    @contextmanager
    def at_batch_indices(self, indices: Iterable[int]) -> Iterator[Self]:
        """Inside, batches of this thread consist of just these rows, in this order, and no other row changes. An inner
        scope replaces the outer one until it ends. Raises ValueError for rows out of range, repeated or none."""
        rows = checks.checked_rows(indices, self.num_indices)
        if not rows:
            raise ValueError("expected at least one row in the scope, got none")
        with self._scope.at(rows):
            yield self

    def rows_to_clear(self, batch_indices: int | Iterable[int] | None = None) -> list[int]:
        """Check which rows `clear` would empty, emptying none: several memories can so change all or none."""
        _ = self.store  # refuses a closed memory
        return checks.rows_in_scope(batch_indices, self.scoped_indices, self.num_indices)

    def retrieve(self, queries: Tensor, topk: int, *, rows: Rows = None) -> Retrieved:
        """The `topk` entries of its own row and head with the largest inner product, for each query.

        queries: (R, ..., D) for one key/value head, else (R, H, ..., D) with H a multiple of G.
        rows: to search, instead of those in scope.
        Returns slots, scores and mask, each (R, ..., topk), on the device of the queries. Raises ValueError for other
        shapes or topk < 1, and on a CPU (a GPU would have to wait) NonFiniteError for queries that are not finite.
        """
        rows = self.scoped_indices if rows is None else rows
        with self.store.lock:
            return search_rows(self.store, self.searcher, rows, queries, topk, self.hidden.now)

    def look_up(self, queries: Tensor, topk: int, hidden_rows: Tensor | None = None, *, rows: Rows = None) -> Lookup:
        """`retrieve`, with a lease on what was found: what an attention layer needs, and its backward pass later.

        hidden_rows: (R,) or, for queries (R, ..., T, D), (R, T) bool; rows or tokens that find nothing.
        """
        if torch.compiler.is_compiling():
            return Lookup(*traced_look_up(queries.detach(), self._number, topk, hidden_rows, rows))
        began = time.perf_counter()
        with self.store.lock:
            found = self.retrieve(queries, topk, rows=rows)
            lease = token_for(self.store.log.begin(self.store))
        self.seconds_searching += time.perf_counter() - began
        return Lookup(*(found if hidden_rows is None else without_rows(found, hidden_rows)), lease)

    def search(self, queries: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """`retrieve`, with copies of keys and values: key_values (R, ..., topk, 2, D) and mask (R, ..., topk). Where
        mask is False key_values is 0. Of codes, the copies are the float32 numbers that these stand for."""
        with self.store.lock:
            slots, _, mask = self.retrieve(queries, topk)
            key_values = self.store.pairs_of(slots).to(queries.device)
        return key_values.masked_fill_(~mask[..., None, None], 0), mask

    def recall(self, queries: Tensor, topk: int, sample: int = 64) -> float:
        """The share of the truly best entries that the index finds for at most `sample` of the T queries of a row and
        head, evenly spread. queries: as for `retrieve`, (R, ..., T, D)."""
        queries = some(queries, sample) if queries.ndim > (2 if self.num_kv_heads == 1 else 3) else queries
        with self.store.lock:
            rings = [self.store.ring(row) for row in self.scoped_indices]
            return recall_of(queries, self.retrieve(queries, topk).scores, rings)

    def origins(self, slots: Tensor) -> Tensor:
        """slots (...) -> (..., 3) int64: document id, position in the document, token id; -1 where not given."""
        with self.store.lock:
            checks.check_slots(slots, self.num_indices * self.num_kv_heads * self.store.room)
            return self.store.origins_of(slots).to(slots.device)

    def entries(self, row: int) -> Iterator[Origin]:
        """Where each entry of a row comes from, the oldest first. Raises ValueError if the row does not exist."""
        checks.checked_rows([row], self.num_indices)
        with self.store.lock:
            origins = self.store.origins[row][self.store.places_in_order(row)].tolist()
        return (Origin(*origin) for origin in origins)

    def add(self, memories: Tensor, mask: Tensor | None = None, origins: Tensor | None = None) -> None:
        """Store entries, oldest first, over the oldest of each row.

        memories: (R, G, N, 2, D), or (R, N, 2, D) for one key/value head; keys at [..., 0, :], values at [..., 1, :].
        mask: (R, N) bool; entries where it is False (padding) are not stored.
        origins: (R, N, 3) integers: document id, position in the document, token id; unknown (-1) unless given.

        Raises ValueError, with nothing stored, for other shapes, entries that are not floating-point numbers, or
        (NonFiniteError) not finite in the memory's dtype (in float32 for codes).
        """
        self.commit(self.stage(memories, mask, origins))

    def stage(
        self, memories: Tensor, mask: Tensor | None = None, origins: Tensor | None = None, *, rows: Rows = None
    ) -> StagedEntries:
        """Check and convert what `add` would store, storing nothing: several memories can so change all or none."""
        return staged(
            self.store.sizes, self.device, self.scoped_indices if rows is None else rows, memories, mask, origins
        )

    def commit(self, entries: StagedEntries) -> None:
        """Store what `stage` has checked."""
        with self.store.lock:
            if not self.store.has_room_for(entries):
                self.replace_store(self.store.resized(self.max_memories))
            for i, row in enumerate(entries.rows if self.policy == BY_DOCUMENT else []):
                documents = entries.origins[i, :, 0] if entries.mask is None else entries.origins[i, entries.mask[i], 0]
                self.remove(row, of_oldest_documents(self.store, row, documents))
            self.store.write(entries)

    def clear(self, batch_indices: int | Iterable[int] | None = None) -> None:
        """Empty these rows, or every row in scope. Raises ValueError for rows out of range or outside the scope."""
        rows = self.rows_to_clear(batch_indices)
        with self.store.lock:
            self.store.clear(rows)
            self.searcher.forget(rows)

    def forget(self, documents: Iterable[int]) -> int:
        """Remove every entry of these documents (the first number of their origins) from all rows, whatever the scope.
        Returns how many entries that were. Those that stay keep their order, but not their slots."""
        wanted = torch.tensor(sorted(set(documents)), dtype=torch.int64, device=self.device)
        with self.store.lock:
            rows = range(self.num_indices)
            return sum(self.remove(row, torch.isin(self.store.numbers_in(row), wanted)) for row in rows)

    def remove(self, row: int, gone: Tensor) -> int:
        """Remove the entries of a row in the places where gone (N,) is True; how many those are."""
        with self.store.lock:
            if count := int(gone.sum()):
                self.store.remove(row, gone)
                self.searcher.forget([row])
        return count

    def state_dict(self) -> dict[str, Tensor]:
        """What every row holds and what is overwritten next, as CPU tensors that safetensors takes; see `snapshot`."""
        with self.store.lock:
            return take_snapshot(self.store)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become the memory, of the same sizes and dtype, whose `state_dict` this is. Look-ups keep what they found.
        Raises ValueError, and changes nothing, for a state that does not fit."""
        self.replace_store(restored(self.store, state))

    def resize(self, max_memories: int) -> None:
        """Change the capacity. Each row keeps its newest entries, in other slots; look-ups keep what they found.
        Raises ValueError for a capacity below 1."""
        checks.check_capacity(max_memories)
        with self.store.lock:
            self.replace_store(self.store.resized(max_memories))

    def replace_store(self, store: Store) -> None:
        """Use this store from now on, and remove the files of the one before."""
        self.swap_store(store).close()

    def swap_store(self, store: Store) -> Store:
        """Use this store from now on; the one before, which stays as it was."""
        with self.store.lock:
            before, store.lock = self.store, self.store.lock
            self.searcher.forget()
            self._open_store, self.max_memories = store, store.capacity
        return before

    def search_with(self, index: str) -> None:
        """Be searched like this from now on (see `index`). Raises ValueError, changing nothing, for an unknown one."""
        checks.check_options({}, self.dtype, self.device, index, mapped=False)
        self.index, self.searcher = index, make_index(index, self.dim, self.device)

    @property
    def is_closed(self) -> bool:
        """Whether `cleanup` has been called."""
        return self._open_store is None

    def cleanup(self) -> None:
        """Close the memory and remove its files, if it has any. It cannot be used afterwards."""
        if self._open_store is not None:
            self._open_store.close()
            self.searcher.forget()
            self._open_store = None

    def __exit__(self, *exception: object) -> None:
        self.cleanup()
