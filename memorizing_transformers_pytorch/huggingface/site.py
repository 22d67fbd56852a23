"""What layers with a memory have in common: the memory itself, and what they keep aside for it.

Shapes: B rows of the batch, R rows of the memory, H query heads, G key/value heads, T queries, K retrieved, D head
width, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.huggingface.calls import Call
from memorizing_transformers_pytorch.huggingface.options import Options
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.entries import POSITION, StagedEntries
from memorizing_transformers_pytorch.memory.policy import OLDEST
from memorizing_transformers_pytorch.memory.retrieved import Lookup
from memorizing_transformers_pytorch.memory.vectors import Vectors


@dataclass
class Reading:
    """Which rows of the memory are in the batch, and whether what passes shall be remembered.

    offsets: for each of them how many tokens were read before. staging: whether keys and values are kept aside.
    call: what the model has been called with, where a layer needs it.
    """

    rows: list[int]
    offsets: Tensor
    staging: bool = False
    call: Call | None = None

    def stand_at(self, offsets: Tensor) -> None:
        """From now on all rows are in the batch, with so many tokens read of each, and nothing is kept aside."""
        self.rows, self.offsets, self.staging = list(range(len(offsets))), offsets, False


@dataclass(frozen=True)
class Shape:
    """Of the entries of a layer: key/value heads G, head width D, and where and how they are kept unless told."""

    kv_heads: int
    width: int
    device: torch.device
    dtype: torch.dtype


class Site:
    """A layer with a memory.

    index: the number of the layer. sees_calls: whether it needs `Reading.call`. memories: what it remembers; new
    entries enter the first. arrived: keys and values (B, G, T, D) of the last call, while `reading.staging`; keys are
    turned to where they stand. last_lookups: what the last call found in each of the memories. last_weights:
    (B, H, T, K), the attention on it, while `keeps_weights`.
    """

    sees_calls = False

    def __init__(self, index: int, shape: Shape, options: Options, reading: Reading) -> None:
        self.index, self.options, self.reading = index, options, reading
        self._shape = shape
        self.memories = self.new_memories(1)
        self.enabled = True
        self.arrived: tuple[Tensor, Tensor] | None = None
        self.last_lookups: list[Lookup | None] = []
        self.last_weights: Tensor | None = None
        self.keeps_weights = False
        self._settled: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        """Copies of a module (as PEFT makes them) share the memory."""
        return self

    def attach(self) -> None:
        """Take part in the model from now on."""
        raise NotImplementedError

    def detach(self) -> None:
        """Undo `attach`, and forget everything."""
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        """What was added to the model, to be learned."""
        raise NotImplementedError

    def new_memories(self, rows: int) -> list[KNNMemory]:
        return [self.new_memory(rows, self.options.max_memories, self.options.index, self.options.policy)]

    def new_memory(self, rows: int, capacity: int, index: str, policy: str = OLDEST) -> KNNMemory:
        options, shape = self.options, self._shape
        return KNNMemory(
            shape.width,
            capacity,
            rows,
            num_kv_heads=shape.kv_heads,
            dtype=shape.dtype if options.dtype is None else options.dtype,
            device=shape.device if options.device is None else torch.device(options.device),
            index=index,
            directory=options.directory,
            policy=policy,
        )

    def use_memories(self, memories: list[KNNMemory]) -> None:
        """Remember in these from now on, and close those before."""
        self.close()
        self.memories = memories
        self.forget_last()

    def exchange(self, memories: list[KNNMemory]) -> list[KNNMemory]:
        """Remember in these from now on; those before, which stay open."""
        before, self.memories = self.memories, []
        self.use_memories(memories)
        return before

    def search_with(self, index: str) -> None:
        """Search what is remembered, apart from recent entries, like this; see `KNNMemory.search_with`."""
        self.memories[-1].search_with(index)

    @property
    def arrangement(self) -> str:
        """How what is remembered lies in the memories; what was saved can be used where it is the same."""
        return "as they were"

    def check_memories(self, memories: list[KNNMemory]) -> None:
        """Raises ValueError for memories that cannot be those of this layer."""
        expected = self._shape.kv_heads, self._shape.width
        for memory in memories:
            if (got := (memory.num_kv_heads, memory.dim)) != expected:
                raise ValueError(f"expected key/value heads and width {expected} in layer {self.index}, got {got}")

    def carried_over(self, others: list[KNNMemory], row: int, numbers: int, places: int) -> StagedEntries:
        """What a row of other such memories holds, as it can be added here, with document numbers and places that are
        so much larger, the oldest first."""
        parts = [
            self._moved(other.store.oldest(row, other.num_entries[row]), places, i) for i, other in enumerate(others)
        ]
        keys, values = (
            Vectors.cat([getattr(part, name) for part in reversed(parts)], 2) for name in ("keys", "values")
        )
        origins = torch.cat([part.origins for part in reversed(parts)], 1)
        origins[..., 0] += torch.where(origins[..., 0] < 0, 0, numbers)
        origins[..., POSITION] += torch.where(origins[..., POSITION] < 0, 0, places)
        return StagedEntries([row], keys, values, origins, None)

    def _moved(self, entries: StagedEntries, places: int, part: int) -> StagedEntries:
        """Entries of one of the memories, as they lie in the last one when they stand so many places later."""
        return entries

    def let_grow_old(self, row: int, place: int) -> None:
        """Entries that stand too far before this place for what the layer does with recent ones."""

    def close(self) -> None:
        for memory in self.memories:
            memory.cleanup()

    def clear(self, rows: list[int]) -> None:
        for memory in self.memories:
            memory.clear(rows)
        self.forget_last()

    @property
    def num_rows(self) -> int:
        return self.memories[0].num_indices

    @property
    def num_entries(self) -> tuple[int, ...]:
        """Of each row."""
        return tuple(map(sum, zip(*(memory.num_entries for memory in self.memories), strict=True)))

    @property
    def num_bytes(self) -> int:
        """What the entries take: keys, values, and what is known of them."""
        return sum(sum(memory.num_entries) * memory.store.sizes.bytes_per_entry for memory in self.memories)

    @property
    def last_retrieved(self) -> Tensor | None:
        """Origins (R, H, T, K, 3) of what the last call found, -1 where it found nothing; None if it did not look."""
        return self._found_at() if self._settled is None else self._settled

    def settle(self) -> None:
        """Keep the origins of what the last call found, as entries are about to be overwritten."""
        self._settled = self._found_at()

    def forget_last(self) -> None:
        """Nothing was looked up any more."""
        self.last_lookups, self.last_weights, self._settled = [], None, None

    def _found_at(self) -> Tensor | None:
        origins = [lookup.origins() for lookup in self.last_lookups if lookup is not None]
        return torch.cat(origins, dim=-2) if origins else None

    def begin_call(self, batch: int) -> None:
        """Forget the last call. Raises ValueError for a batch that the rows of the memory cannot serve."""
        self.forget_last()
        rows = len(self.reading.rows)
        if batch % rows:
            raise ValueError(f"expected a batch that is a multiple of the {rows} rows of the memory, got {batch}")

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to look up."""
        return not self.enabled or not any(map(self._holds_something, self.memories))

    def _holds_something(self, memory: KNNMemory) -> bool:
        return not memory.is_closed and any(memory.num_entries[row] for row in self.reading.rows)

    def look_up(self, queries: list[Tensor]) -> list[tuple[Tensor, Lookup]]:
        """Queries (B, H, T, D) for each of the memories -> those of the memories that hold something, and what each row
        of the batch found."""
        found = []
        for memory, query in zip(self.memories, queries, strict=True):
            lookup = None
            if self._holds_something(memory):
                lookup = memory.look_up(self._grouped(query.detach()), self.options.topk, rows=self.reading.rows)
                found.append((query, _of_batch(lookup, query)))
            self.last_lookups.append(lookup)
        return found

    def stage(self, keys: Tensor, values: Tensor, mask: Tensor, origins: Tensor) -> StagedEntries:
        """Keys and values (R, G, N, D) where mask (R, N) is True, as they can be stored: storing nothing yet."""
        memory = self.memories[0]
        with memory.at_batch_indices(self.reading.rows):
            return memory.stage(torch.stack((keys, values.to(keys)), dim=-2), mask, origins)

    def commit(self, entries: StagedEntries) -> None:
        """Store what `stage` has checked."""
        self.memories[0].commit(entries)

    def of_rows(self, numbers: Tensor, batch: int) -> Tensor:
        """(R,) -> (B,): each row of the memory serves as many rows of the batch, one after the other."""
        return numbers.repeat_interleave(batch // len(numbers))

    def _grouped(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (R, H, B / R * T, D)."""
        rows, (batch, heads, count, size) = len(self.reading.rows), x.shape
        if rows == batch:
            return x
        return x.view(rows, batch // rows, heads, count, size).transpose(1, 2).reshape(rows, heads, -1, size)


def _of_batch(lookup: Lookup, query: Tensor) -> Lookup:
    """(R, H, B / R * T, K) -> (B, H, T, K): several rows of the batch may share a row of the memory."""
    batch, heads, count, _ = query.shape
    if len(lookup.slots) == batch:
        return lookup

    def spread(x: Tensor) -> Tensor:
        return x.view(len(x), heads, batch // len(x), count, -1).transpose(1, 2).reshape(batch, heads, count, -1)

    return lookup._replace(slots=spread(lookup.slots), scores=spread(lookup.scores), mask=spread(lookup.mask))


def parameters_in_use(module: Any) -> list[nn.Parameter]:
    """Those of a module that was added, or of the copy of it that an adapter (PEFT) has made and uses."""
    copies = getattr(module, "modules_to_save", {})
    used = [copies[name] for name in getattr(module, "active_adapters", []) if name in copies]
    return list((used[0] if used else module).parameters())
