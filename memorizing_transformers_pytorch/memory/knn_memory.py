"""KNNMemory: what one layer remembers of the documents in its rows.

It checks what comes in, keeps it in a `Store` and finds it again with an `Index`. It knows nothing of models.

Shapes: R rows in scope, H query heads, G key/value heads, N entries added, K retrieved, D head width, M capacity.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import checks
from memorizing_transformers_pytorch.memory.index.auto import make_index
from memorizing_transformers_pytorch.memory.index.exact import Index
from memorizing_transformers_pytorch.memory.policy import OLDEST, POLICIES, entries_to_remove
from memorizing_transformers_pytorch.memory.retrieved import Origin
from memorizing_transformers_pytorch.memory.searched import Searched
from memorizing_transformers_pytorch.memory.snapshot import restored, take_snapshot
from memorizing_transformers_pytorch.memory.store import ORIGIN_FIELDS, UNKNOWN, Sizes, StagedEntries, Store
from memorizing_transformers_pytorch.memory.vectors import Vectors


def _searcher(index: str, device: torch.device, dim: int) -> Index:
    return make_index("exact" if index == "auto" and device.type != "cpu" else index, dim)


class KNNMemory(Searched, AbstractContextManager["KNNMemory"]):
    """A memory of (key, value) pairs for each row, searched by largest inner product (Wu et al., ICLR 2022, section 3).

    Each row keeps exactly the last `max_memories` entries added to it since it was last cleared (unless `policy` says
    otherwise).

    dim: width D of keys and values.
    max_memories: capacity M of each row.
    num_indices: number of rows; each remembers its own document.
    num_kv_heads: key/value heads G. Query head h reads key/value head h // (H / G).
    dtype: how keys and values are stored: torch.float32, torch.bfloat16, torch.float16, or torch.int8 for codes with a
        scale for each vector (see `vectors`), a quarter of float32. What is stored is searched and attended to: with
        codes there are no exact keys to rank candidates by. Compact codes for the search alone, whose candidates are
        ranked by exact keys, are an index such as "IVF64,SQ8" or "SQ8" over another dtype.
    device: where they lie; the CPU unless said otherwise.
    index: "exact", brute force over the stored keys; "auto", which passes to inverted lists where these are cheaper and
        find 95% of the best entries; or any faiss factory string, such as "IVF1024,SQfp16". All but "exact" need the
        CPU ("auto" is exact on a GPU). `index_in_use` says what searches.
    directory: keep the entries in memory-mapped files in a fresh folder below this one, instead of in RAM. The files
        are removed by `cleanup()`, or at the end of a `with` block.
    policy: what makes room in a full row: "oldest", the oldest entries; "least-attended", those of its older half that
        were retrieved least often since they were written, a sixteenth of the row at a time; or "by-document", the
        whole of the oldest document.
    memmap_filename, multiprocessing: arguments of the original package. The first only chooses the directory (files
        get names of their own), the second has no effect; both say so once.

    Several threads may use it: each call sees the memory before or after a change, never amidst. (A scope is shared.)

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
        if multiprocessing is not None:
            checks.warn_once("multiprocessing has no effect: the exact search already uses every core")
        if memmap_filename is not None:
            directory = Path(memmap_filename).parent if directory is None else directory
            checks.warn_once(f"memmap_filename only chooses the directory, {directory}; files get unique names")
        device = torch.device(device or "cpu")
        checks.check_options(sizes, dtype, device, index, mapped=directory is not None)
        if policy not in POLICIES:
            raise ValueError(f"expected policy to be one of {POLICIES}, got {policy!r}")

        self.dim = dim
        self.max_memories = max_memories
        super().__init__(num_indices, num_kv_heads)
        self.dtype = dtype
        self.device = device
        self.index = index
        self.policy = policy
        self.lock = threading.RLock()
        self.searcher = _searcher(index, device, dim)
        sizes_of_store = Sizes(num_indices, num_kv_heads, max_memories, dim, dtype)
        self._open_store: Store | None = Store(sizes_of_store, device, None if directory is None else Path(directory))

    def __repr__(self) -> str:
        entries = "closed" if self._open_store is None else f"entries={list(self.num_entries)}"
        names = ("dim", "max_memories", "num_indices", "num_kv_heads", "dtype", "index")
        return f"KNNMemory({', '.join(f'{name}={getattr(self, name)!r}' for name in names)}, {entries})"

    @property
    def store(self) -> Store:
        """The entries themselves. Raises ValueError after `cleanup()`."""
        if self._open_store is None:
            raise ValueError("expected an open memory, got one that cleanup() has closed")
        return self._open_store

    @property
    def num_entries(self) -> tuple[int, ...]:
        """How many entries each row holds, of all rows."""
        return tuple(self.store.filled)

    @property
    def index_in_use(self) -> str:
        """What searches, in words: the structure, how far it looks, and its recall as measured last."""
        return self.searcher.description

    def clear(self, batch_indices: int | Iterable[int] | None = None) -> None:
        """Empty these rows (numbered as in the whole memory), or every row in scope.

        Raises ValueError for rows that are out of range or outside the scope.
        """
        rows = self.rows_to_clear(batch_indices)
        with self.lock:
            self.store.clear(rows)
            self.searcher.forget(rows)

    def forget(self, documents: Iterable[int]) -> int:
        """Remove every entry of these documents (the first number of their origins) from all rows, whatever the scope.

        Returns how many entries that were. Those that stay keep their order, but not their slots.
        """
        wanted, count = torch.tensor(sorted(set(documents)), dtype=torch.int64, device=self.device), 0
        with self.lock:
            for row in range(self.num_indices):
                gone = torch.isin(self.store.origins[row, : self.store.filled[row], 0], wanted)
                count += self._remove(row, gone)
        return count

    def drop_oldest(self, row: int, count: int) -> None:
        """Remove so many of the oldest entries of a row."""
        with self.lock:
            gone = torch.zeros(self.store.filled[row], dtype=torch.bool, device=self.device)
            gone[self.store.places_in_order(row)[:count]] = True
            self._remove(row, gone)

    def _remove(self, row: int, gone: Tensor) -> int:
        count = int(gone.sum())
        if count:
            self.store.remove(row, gone)
            self.searcher.forget([row])
        return count

    def documents_in(self, row: int) -> set[int]:
        """The numbers of the documents of which a row holds entries."""
        numbers: Tensor = self.store.origins[row, : self.store.filled[row], 0].unique()  # type: ignore[no-untyped-call]
        return set(numbers.tolist())

    def entries(self, row: int) -> Iterator[Origin]:
        """Where each entry of a row comes from, the oldest first. Raises ValueError for a row that there is not."""
        checks.checked_rows([row], self.num_indices)
        origins = self.store.origins[row][self.store.places_in_order(row)].tolist()
        return (Origin(*origin) for origin in origins)

    def rows_to_clear(self, batch_indices: int | Iterable[int] | None = None) -> list[int]:
        """As `Scoped.rows_to_clear`. Raises ValueError also for a closed memory."""
        _ = self.store
        return super().rows_to_clear(batch_indices)

    def add(self, memories: Tensor, mask: Tensor | None = None, origins: Tensor | None = None) -> None:
        """Store entries, oldest first, over the oldest of each row.

        memories: (R, G, N, 2, D), or (R, N, 2, D) for one key/value head; keys at [..., 0, :], values at [..., 1, :].
        mask: (R, N) bool; entries where it is False (padding) are not stored.
        origins: (R, N, 3) integers: document id, position in the document, token id; unknown (-1) unless given.

        Raises ValueError, before anything is stored, for other shapes, entries that are not floating-point numbers,
        or (NonFiniteError) entries that are not finite in the memory's dtype (in float32 for codes).
        """
        self.commit(self.stage(memories, mask, origins))

    def stage(
        self,
        memories: Tensor,
        mask: Tensor | None = None,
        origins: Tensor | None = None,
        *,
        rows: Sequence[int] | None = None,
    ) -> StagedEntries:
        """Check and convert what `add` would store, storing nothing: several memories can so change all or none.

        rows: R row numbers of the whole memory; those of the scope unless given.
        """
        _ = self.store  # refuses a closed memory
        chosen = list(self.scoped_indices if rows is None else rows)
        memories = checks.checked_entries(memories, len(chosen), self.num_kv_heads, self.dim)
        shape = len(chosen), memories.shape[2]
        if origins is None:
            origins = torch.full((*shape, ORIGIN_FIELDS), UNKNOWN)
        origins = checks.checked_origins(mask, origins, shape, ORIGIN_FIELDS)
        floats = memories.detach().to(self.device, self.store.keys.float_dtype)
        checks.check_finite(floats, mask)
        keys, values = (Vectors.of(part, self.dtype) for part in floats.unbind(dim=-2))
        mask = None if mask is None else mask.to(self.device)
        return StagedEntries(chosen, keys, values, origins.to(self.device), mask)

    def commit(self, staged: StagedEntries) -> None:
        """Store what `stage` has checked."""
        with self.lock:
            if not self.store.has_room_for(staged):
                self.replace_store(self.store.resized(self.max_memories))
            for i, row in enumerate(staged.rows):
                documents = staged.origins[i, :, 0] if staged.mask is None else staged.origins[i, staged.mask[i], 0]
                gone = entries_to_remove(self.store, row, documents, self.policy)
                if gone is not None:
                    self._remove(row, gone)
            self.store.write(staged)

    def state_dict(self) -> dict[str, Tensor]:
        """What every row holds and what is overwritten next, as CPU tensors that safetensors takes; see `snapshot`."""
        return take_snapshot(self.store)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become the memory, of the same sizes and dtype, whose `state_dict` this is. Look-ups keep what they found.

        Raises ValueError, and changes nothing, for a state that does not fit.
        """
        self.replace_store(restored(self.store, state))

    def resize(self, max_memories: int) -> None:
        """Change the capacity. Each row keeps its newest entries, in other slots; look-ups keep what they found.

        Raises ValueError for a capacity below 1.
        """
        self.replace_store(self.resized_store(max_memories))

    def resized_store(self, max_memories: int) -> Store:
        """What `resize` would use from then on, changing nothing: several memories can so change all or none."""
        if max_memories < 1:
            raise ValueError(f"expected max_memories to be at least 1, got {max_memories}")
        return self.store.resized(max_memories)

    def replace_store(self, store: Store) -> None:
        """Use this store from now on, and remove the files of the one before."""
        with self.lock:
            self.store.close()
            self.searcher.forget()
            self._open_store, self.max_memories = store, store.capacity

    def search_with(self, index: str) -> None:
        """Be searched like this from now on (see `index`). Raises ValueError, changing nothing, for an unknown one."""
        checks.check_options({}, self.dtype, self.device, index, mapped=False)
        searcher = _searcher(index, self.device, self.dim)
        with self.lock:
            self.index, self.searcher = index, searcher

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
