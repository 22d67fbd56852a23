"""KNNMemory: what one layer remembers of the documents in its rows.

It checks what comes in, keeps it in a `Store` and finds it again with an `Index`. It knows nothing of models.

Shapes: R rows in scope, H query heads, G key/value heads, N entries added, K retrieved, D head width, M capacity.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import checks
from memorizing_transformers_pytorch.memory.auto import make_index
from memorizing_transformers_pytorch.memory.recall import recall_of
from memorizing_transformers_pytorch.memory.retrieved import Lookup, Retrieved
from memorizing_transformers_pytorch.memory.snapshot import restored, take_snapshot
from memorizing_transformers_pytorch.memory.store import ORIGIN_FIELDS, UNKNOWN, StagedEntries, Store
from memorizing_transformers_pytorch.memory.structure import some


class KNNMemory(AbstractContextManager["KNNMemory"]):
    """A memory of (key, value) pairs for each row, searched by largest inner product (Wu et al., ICLR 2022, section 3).

    Each row keeps exactly the last `max_memories` entries added to it since it was last cleared.

    dim: width D of keys and values.
    max_memories: capacity M of each row.
    num_indices: number of rows; each remembers its own document.
    num_kv_heads: key/value heads G. Query head h reads key/value head h // (H / G).
    dtype: how keys and values are stored: torch.float32, torch.bfloat16 or torch.float16.
    device: where they lie; the CPU unless said otherwise.
    index: "exact", brute force over the stored keys; "auto", which passes to inverted lists where these are cheaper and
        find 95% of the best entries; or any faiss factory string, such as "IVF1024,SQfp16". All but "exact" need the
        CPU ("auto" is exact on a GPU). `index_in_use` says what searches.
    directory: keep the entries in memory-mapped files in a fresh folder below this one, instead of in RAM. The files
        are removed by `cleanup()`, or at the end of a `with` block.
    memmap_filename, multiprocessing: arguments of the original package. The first only chooses the directory (files
        get names of their own), the second has no effect; both say so once.

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
    ) -> None:
        sizes = {"dim": dim, "max_memories": max_memories, "num_indices": num_indices, "num_kv_heads": num_kv_heads}
        if multiprocessing is not None:
            checks.warn_once("multiprocessing has no effect: the exact search already uses every core")
        if memmap_filename is not None:
            directory = Path(memmap_filename).parent if directory is None else directory
            checks.warn_once(f"memmap_filename only chooses the directory, {directory}; files get unique names")
        device = torch.device(device or "cpu")
        checks.check_options(sizes, dtype, device, index, mapped=directory is not None)

        self.dim = dim
        self.max_memories = max_memories
        self.num_indices = num_indices
        self.num_kv_heads = num_kv_heads
        self.dtype = dtype
        self.device = device
        self.scoped_indices = list(range(num_indices))
        self.seconds_searching = 0.0
        self.index = index
        self.searcher = make_index("exact" if index == "auto" and device.type != "cpu" else index, dim)
        self._open_store: Store | None = Store(
            rows=num_indices,
            kv_heads=num_kv_heads,
            capacity=max_memories,
            dim=dim,
            dtype=dtype,
            device=device,
            directory=None if directory is None else Path(directory),
        )

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

    @contextmanager
    def at_batch_indices(self, indices: Iterable[int]) -> Iterator[KNNMemory]:
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

    def clear(self, batch_indices: int | Iterable[int] | None = None) -> None:
        """Empty these rows (numbered as in the whole memory), or every row in scope.

        Raises ValueError for rows that are out of range or outside the scope.
        """
        rows = self.rows_to_clear(batch_indices)
        self.store.clear(rows)
        self.searcher.forget(rows)

    def rows_to_clear(self, batch_indices: int | Iterable[int] | None = None) -> list[int]:
        """Check which rows `clear` would empty, emptying none: several memories can so change all or none."""
        _ = self.store  # refuses a closed memory
        if batch_indices is None:
            batch_indices = self.scoped_indices
        elif not isinstance(batch_indices, Iterable):
            batch_indices = [batch_indices]
        rows = checks.checked_rows(batch_indices, self.num_indices)
        if not set(rows) <= set(self.scoped_indices):
            raise ValueError(f"expected rows of the scope {self.scoped_indices}, got {rows}")
        return rows

    def add(self, memories: Tensor, mask: Tensor | None = None, origins: Tensor | None = None) -> None:
        """Store entries, oldest first, over the oldest of each row.

        memories: (R, G, N, 2, D), or (R, N, 2, D) for one key/value head; keys at [..., 0, :], values at [..., 1, :].
        mask: (R, N) bool; entries where it is False (padding) are not stored.
        origins: (R, N, 3) integers: document id, position in the document, token id; unknown (-1) unless given.

        Raises ValueError, before anything is stored, for other shapes, entries that are not floating-point numbers,
        or (NonFiniteError) entries that are not finite in the memory's dtype.
        """
        self.commit(self.stage(memories, mask, origins))

    def stage(self, memories: Tensor, mask: Tensor | None = None, origins: Tensor | None = None) -> StagedEntries:
        """Check and convert what `add` would store, storing nothing: several memories can so change all or none."""
        _ = self.store  # refuses a closed memory
        memories = checks.checked_entries(memories, len(self.scoped_indices), self.num_kv_heads, self.dim)
        rows, _, count = memories.shape[:3]
        if origins is None:
            origins = torch.full((rows, count, ORIGIN_FIELDS), UNKNOWN)
        checks.check_mask_and_origins(mask, origins, (rows, count), ORIGIN_FIELDS)
        stored = memories.detach().to(self.device, self.dtype)
        checks.check_finite(stored, mask)
        keys, values = stored.unbind(dim=-2)
        mask = None if mask is None else mask.to(self.device)
        return StagedEntries(list(self.scoped_indices), keys, values, origins.to(self.device, torch.int64), mask)

    def commit(self, staged: StagedEntries) -> None:
        """Store what `stage` has checked."""
        self.store.write(staged)

    def retrieve(self, queries: Tensor, topk: int) -> Retrieved:
        """The `topk` entries of its own row and head with the largest inner product, for each query.

        queries: (R, ..., D) for one key/value head, else (R, H, ..., D) with H a multiple of G.
        Returns slots, scores and mask, each (R, ..., topk), on the device of the queries. Keys and values stay where
        they are. Raises ValueError for other shapes or topk < 1, NonFiniteError for queries that are not finite.
        """
        checks.check_queries(queries, topk, len(self.scoped_indices), self.num_kv_heads, self.dim)
        grouped = queries.detach().to(self.device).reshape(queries.shape[0], self.num_kv_heads, -1, self.dim)
        score_dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
        shape = (*grouped.shape[:3], topk)
        slots = torch.zeros(shape, dtype=torch.int64, device=self.device)
        scores = torch.zeros(shape, dtype=score_dtype, device=self.device)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if grouped.shape[2] > 0:
            for i, row in enumerate(self.scoped_indices):
                self._search_row(row, grouped[i], topk, slots[i], scores[i], mask[i])
        shape = (*queries.shape[:-1], topk)
        return Retrieved(*(part.view(shape).to(queries.device) for part in (slots, scores, mask)))

    def _search_row(self, row: int, queries: Tensor, topk: int, slots: Tensor, scores: Tensor, mask: Tensor) -> None:
        """Search one row with queries (G, Q, D), and fill in its slots, scores and mask, each (G, Q, topk)."""
        found = min(topk, self.store.filled[row])
        if found == 0:
            return
        best = self.searcher.search(self.store.ring(row), queries, topk)
        bases = torch.tensor([self.store.slot_base(row, head) for head in range(self.num_kv_heads)], device=self.device)
        slots[..., :found] = best.places + bases[:, None, None]
        scores[..., :found] = best.scores
        mask[..., :found] = True

    def look_up(self, queries: Tensor, topk: int, hidden_rows: Tensor | None = None) -> Lookup:
        """`retrieve`, with the keys and values behind it: what an attention layer needs, and its backward pass later.

        hidden_rows: (R,) or, for queries (R, ..., T, D), (R, T) bool; rows or tokens that shall find nothing.
        """
        began = time.perf_counter()
        slots, scores, mask = self.retrieve(queries, topk)
        self.seconds_searching += time.perf_counter() - began
        if hidden_rows is not None:
            rows, *tokens = hidden_rows.shape
            shape = (rows, *(1,) * (mask.ndim - 2 - len(tokens)), *tokens, 1)
            mask = mask & ~hidden_rows.to(mask.device).view(shape)
        for_backward = torch.is_grad_enabled()
        return Lookup(self.store, self.scoped_indices, Retrieved(slots, scores, mask), for_backward=for_backward)

    def search(self, queries: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """`retrieve`, with copies of keys and values: key_values (R, ..., topk, 2, D) and mask (R, ..., topk).

        Where mask is False key_values is 0. Both are on the device of the queries.
        """
        slots, _, mask = self.retrieve(queries, topk)
        key_values = self.store.pairs_of(slots).to(queries.device)
        return key_values.masked_fill_(~mask[..., None, None], 0), mask

    def recall(self, queries: Tensor, topk: int, sample: int = 64) -> float:
        """The share of the truly best entries that the index finds for some of the queries.

        queries: as for `retrieve`, (R, ..., T, D). sample: how many of the T are tried, evenly spread.
        """
        if queries.ndim > (2 if self.num_kv_heads == 1 else 3):
            queries = some(queries, sample)
        found = self.retrieve(queries, topk)
        return recall_of(queries, found.scores, [self.store.ring(row) for row in self.scoped_indices])

    def origins(self, slots: Tensor) -> Tensor:
        """slots (...) -> (..., 3) int64: document id, position in the document, token id; -1 where not given."""
        num_slots = self.num_indices * self.num_kv_heads * self.max_memories
        if slots.numel() > 0 and not (int(slots.min()) >= 0 and int(slots.max()) < num_slots):
            raise ValueError(f"expected slots from 0 to {num_slots - 1}, got {int(slots.min())} to {int(slots.max())}")
        return self.store.origins_of(slots).to(slots.device)

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
        self.store.close()
        self.searcher.forget()
        self._open_store, self.max_memories = store, store.capacity

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
