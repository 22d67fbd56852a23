"""The memories of a whole model, which change together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.checks import check_capacity, checked_rows
from memorizing_transformers_pytorch.memory.disk.load import How, check_fingerprint, load
from memorizing_transformers_pytorch.memory.disk.save import Belongings, Marks, save
from memorizing_transformers_pytorch.memory.entries import StagedEntries
from memorizing_transformers_pytorch.memory.knn_memory import KNNMemory
from memorizing_transformers_pytorch.memory.lease import Origin
from memorizing_transformers_pytorch.memory.ledger import Document, DocumentTable, Ledger, document_table, known_numbers
from memorizing_transformers_pytorch.memory.moving import check_like, check_nothing_twice, copied, copy_row, take_over
from memorizing_transformers_pytorch.memory.snapshot import restored


class KNNMemoryList(list[KNNMemory], AbstractContextManager["KNNMemoryList"]):
    """The memories of a model, one per memorizing layer in order of depth. A `with` block ends with `cleanup()`.

    ledger: what is known of the documents in them. fingerprint: of the weights that wrote them, if known. extra: what
    else (as for JSON) is saved with them.
    """

    def __init__(self, memories: Iterable[KNNMemory] = (), ledger: Ledger | None = None) -> None:
        super().__init__(memories)
        self.ledger = Ledger() if ledger is None else ledger
        self.fingerprint: str | None = None
        self.extra: dict[str, Any] = {}
        self.marks: Marks | None = None

    def save(self, path: str | Path, *, overwrite: bool = False, compact: bool = False) -> None:
        """Write the memories to a folder (docs/format.md), which then holds this state; if anything fails, the old one.

        Where the folder is that which these memories were loaded from, or saved to last, only what was added since is
        written (unless compact): it costs about as much as has changed. After `compact` nothing is left on disk of what
        was forgotten or overwritten.

        Raises ValueError, with nothing changed, if the folder holds another state or other things than a memory, unless
        overwrite: then that state is replaced, and other files stay. Raises SaveError if it cannot be written.
        """
        with self.locked():
            belongings = Belongings(self.ledger, self.fingerprint, self.extra)
            self.marks = save(self, Path(path).resolve(), belongings, self.marks, overwrite=overwrite, compact=compact)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        mmap: bool = False,
        verify: bool | None = None,
        fingerprint: str | None = None,
        device: torch.device | str = "cpu",
        directory: str | Path | None = None,
    ) -> KNNMemoryList:
        """The memories that `save` has written.

        mmap: leave the entries in the files, whose pages are read as they are needed and shared among processes; what
            is changed is copied, page by page, and only `save` changes the files. A row that grows by more than an
            eighth takes all of its memory into RAM.
        verify: compare checksums and look for NaN; unless mmap, where it would read everything, if not said. Shapes,
            sizes and what the manifest says are always checked.
        fingerprint: of the weights that will read them; others than those that wrote them are refused.
        device, directory: as for `KNNMemory`.

        Raises ValueError for a folder without a memory, or one that is damaged, foreign, newer, or of other weights.
        """
        how = How(
            mmap,
            not mmap if verify is None else verify,
            torch.device(device),
            None if directory is None else Path(directory),
        )
        found = load(Path(path).resolve(), how)
        check_fingerprint(found.manifest.fingerprint, fingerprint)
        memories = cls(found.memories, Ledger(found.manifest.documents, found.manifest.next_document))
        memories.fingerprint, memories.extra = found.manifest.fingerprint, found.manifest.extra
        memories.marks = found.marks
        return memories

    @property
    def of_layers(self) -> list[int]:
        """How many memories each layer has, one after the other: one, unless `extra` says otherwise."""
        sizes = self.extra.get("memories")
        if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
            return [1] * len(self)
        return sizes if sum(sizes) == len(self) else [1] * len(self)

    def documents(self) -> DocumentTable:
        """What is held of each document: number, title, row, tokens, entries in each layer, when added, bytes."""
        with self.locked():
            return document_table(self, self.ledger, self.of_layers)

    def forget(
        self,
        document: int | str | Iterable[int | str] | None = None,
        *,
        where: Callable[[Document], bool] | None = None,
    ) -> int:
        """Remove every entry of some documents from all memories, at once; from disk with the next `save`.

        document: numbers or titles. where: instead, a function of a document that tells whether it shall go.
        Returns how many entries that were, in all memories. Raises ValueError for documents that there are not.
        """
        with self.locked():
            numbers = self.chosen(document, where)
            count = sum(memory.forget(numbers) for memory in self)
            self.ledger.forget_documents(numbers)
            return count

    def chosen(
        self, document: int | str | Iterable[int | str] | None, where: Callable[[Document], bool] | None
    ) -> list[int]:
        """The numbers of these documents; see `forget`."""
        if (document is None) == (where is None):
            raise ValueError("expected a document or where=, got both or none")
        if where is not None:
            return [each.number for each in self.documents() if where(each)]
        return known_numbers(document, self, self.ledger)

    def entries(self, row: int, layer: int = 0) -> Iterator[Origin]:
        """Where each entry of a row of the layer-th memory comes from, the oldest first."""
        if not 0 <= layer < len(self):
            raise ValueError(f"expected a memory from 0 to {len(self) - 1}, got {layer}")
        return self[layer].entries(row)

    def merge(self, other: KNNMemoryList) -> None:
        """Add all entries and documents of another list after one's own, row by row; capacities grow where needed.

        Raises ValueError, changing nothing, for memories of other shapes or dtypes, written by other weights, or
        with documents of the same saved state.
        """
        check_like(self, other)
        check_fingerprint(other.fingerprint, self.fingerprint)
        if other is self or "arranged" in self.extra or "arranged" in other.extra:
            what = "itself" if other is self else "one of a model of transformers (AttachedMemory.merge)"
            raise ValueError(f"expected another memory, of a model of this package, to merge, got {what}")
        check_nothing_twice(self, self.marks, other, other.marks)
        with KNNMemoryList([*self, *other]).locked():
            for each, table in [(each, each.documents()) for each in (self, other)]:
                # Numbers that only entries know are taken too.
                each.ledger.next_number = max([each.ledger.next_number, *(known.number + 1 for known in table)])
            self.fingerprint = self.fingerprint or other.fingerprint
            shift = self.ledger.merge(other.ledger)
            for memory, more in zip(self, other, strict=True):
                take_over(memory, more, shift)

    def only(self, document: int | str | Iterable[int | str]) -> KNNMemoryList:
        """A new list with the entries of these documents only (numbers or titles). Raises ValueError for unknown."""
        with self.locked():
            numbers = known_numbers(document, self, self.ledger)
            return self._copied([copied(memory, memory.device, numbers) for memory in self], set(numbers))

    def to(self, device: torch.device | str) -> KNNMemoryList:
        """A new list with the same entries on a device."""
        with self.locked():
            return self._copied([copied(memory, torch.device(device)) for memory in self], None)

    def _copied(self, memories: list[KNNMemory], numbers: set[int] | None) -> KNNMemoryList:
        documents = [each for each in self.ledger.documents() if numbers is None or each.number in numbers]
        new = KNNMemoryList(memories, Ledger(documents, self.ledger.next_number))
        new.fingerprint, new.extra = self.fingerprint, dict(self.extra)
        return new

    def copy_row(self, source: int, target: int) -> None:
        """Let a row hold what another does, in every memory: one text that is then continued in two ways. (A document
        is listed once, in the row that read it.) Raises ValueError for rows that do not exist."""
        for memory in self:
            checked_rows([source, target] if source != target else [source], memory.num_indices)
        with self.locked():
            for memory in self if source != target else ():
                copy_row(memory, source, target)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, other threads neither change these memories nor look anything up: several change as one."""
        with ExitStack() as locks:
            for lock in sorted({memory.store.lock for memory in self}, key=id):  # the same order in every thread
                locks.enter_context(lock)
            yield

    @contextmanager
    def at_batch_indices(self, indices: Iterable[int]) -> Iterator[KNNMemoryList]:
        """Scope every memory to these rows; see `KNNMemory.at_batch_indices`."""
        rows = list(indices)
        with ExitStack() as scopes:
            for memory in self:
                scopes.enter_context(memory.at_batch_indices(rows))
            yield self

    def clear_memory(
        self, batch_indices: int | Iterable[int] | None = None, memory_indices: Iterable[int] | None = None
    ) -> None:
        """Empty these rows of these memories; every row in scope and every memory unless said otherwise."""
        rows = list(batch_indices) if isinstance(batch_indices, Iterable) else batch_indices
        chosen = list(range(len(self)) if memory_indices is None else memory_indices)
        if not all(0 <= index < len(self) for index in chosen):
            raise ValueError(f"expected memories from 0 to {len(self) - 1}, got {chosen}")
        to_clear = [(self[index], self[index].rows_to_clear(rows)) for index in chosen]
        with self.locked():
            for memory, memory_rows in to_clear:
                memory.clear(memory_rows)
            if to_clear and set(chosen) == set(range(len(self))):
                self.ledger.clear(to_clear[0][1])

    def add(self, pairs: Sequence[Tensor], mask: Tensor | None = None, origins: Tensor | None = None) -> None:
        """Add one tensor of entries to each memory: to all of them or, where one refuses, to none.

        See `KNNMemory.add`. Raises ValueError for another number of tensors than memories.
        """
        if len(pairs) != len(self):
            raise ValueError(f"expected entries for {len(self)} memories, got {len(pairs)}")
        self.commit([memory.stage(entries, mask, origins) for memory, entries in zip(self, pairs, strict=True)])

    def commit(self, staged: Sequence[StagedEntries]) -> None:
        """Store what `KNNMemory.stage` has checked, in each memory."""
        with self.locked():
            for memory, entries in zip(self, staged, strict=True):
                memory.commit(entries)
            if self.ledger.cleared:
                numbers = [x.origins[..., 0] if x.mask is None else x.origins[..., 0][x.mask] for x in staged]
                self.ledger.note_stored(sorted({number for each in numbers for number in each.flatten().tolist()}))

    def state_dict(self) -> dict[str, Tensor]:
        """That of every memory; the names of the i-th begin with "i."."""
        with self.locked():
            return {f"{i}.{name}": part for i, memory in enumerate(self) for name, part in memory.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore every memory or, where one does not fit, none; see `KNNMemory.load_state_dict`."""
        states: dict[str, dict[str, Tensor]] = {str(i): {} for i in range(len(self))}
        for name, part in state.items():
            number, _, rest = name.partition(".")
            if number not in states:
                raise ValueError(f"expected the state of memories 0 to {len(self) - 1}, got {name!r}")
            states[number][rest] = part
        stores = [restored(memory.store, states[str(i)]) for i, memory in enumerate(self)]
        with self.locked():
            for memory, store in zip(self, stores, strict=True):
                memory.replace_store(store)

    def resize(self, max_memories: int) -> None:
        """Change the capacity of every memory or, where one refuses, of none; see `KNNMemory.resize`."""
        check_capacity(max_memories)
        with self.locked():
            stores = [memory.store.resized(max_memories) for memory in self]  # all, before any is replaced
            for memory, store in zip(self, stores, strict=True):
                memory.replace_store(store)

    def cleanup(self) -> None:
        """Close every memory and remove its files."""
        for memory in self:
            memory.cleanup()

    def __exit__(self, *exception: object) -> None:
        self.cleanup()
