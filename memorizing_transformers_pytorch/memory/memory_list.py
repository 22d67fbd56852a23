"""The memories of a whole model, which change together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor

from memorizing_transformers_pytorch.memory.knn_memory import KNNMemory
from memorizing_transformers_pytorch.memory.snapshot import restored


class KNNMemoryList(list[KNNMemory], AbstractContextManager["KNNMemoryList"]):
    """The memories of a model, one per memorizing layer in order of depth. A `with` block ends with `cleanup()`."""

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
        for memory, memory_rows in to_clear:
            memory.clear(memory_rows)

    def add(self, pairs: Sequence[Tensor], mask: Tensor | None = None, origins: Tensor | None = None) -> None:
        """Add one tensor of entries to each memory: to all of them or, where one refuses, to none.

        See `KNNMemory.add`. Raises ValueError for another number of tensors than memories.
        """
        if len(pairs) != len(self):
            raise ValueError(f"expected entries for {len(self)} memories, got {len(pairs)}")
        staged = [memory.stage(entries, mask, origins) for memory, entries in zip(self, pairs, strict=True)]
        for memory, entries in zip(self, staged, strict=True):
            memory.commit(entries)

    def state_dict(self) -> dict[str, Tensor]:
        """That of every memory; the names of the i-th begin with "i."."""
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
        for memory, store in zip(self, stores, strict=True):
            memory.replace_store(store)

    def resize(self, max_memories: int) -> None:
        """Change the capacity of every memory or, where one refuses, of none; see `KNNMemory.resize`."""
        stores = [memory.resized_store(max_memories) for memory in self]
        for memory, store in zip(self, stores, strict=True):
            memory.replace_store(store)

    def cleanup(self) -> None:
        """Close every memory and remove its files."""
        for memory in self:
            memory.cleanup()

    def __exit__(self, *exception: object) -> None:
        self.cleanup()
