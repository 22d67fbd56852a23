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
from memorizing_transformers_pytorch.memory.retrieved import Lookup, Table
from memorizing_transformers_pytorch.memory.store import StagedEntries


@dataclass
class Reading:
    """Which rows of the memory are in the batch, and whether what passes shall be remembered.

    offsets: for each of them how many tokens were read before. staging: whether keys and values are kept aside.
    call: what the model has been called with.
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

    index: the number of the layer. arrived: keys and values (B, G, T, D) of the last call, while `reading.staging`;
    keys are turned to where they stand. last_lookup: what the last call found.
    """

    def __init__(self, index: int, shape: Shape, options: Options, reading: Reading) -> None:
        self.index, self.options, self.reading = index, options, reading
        self._shape = shape
        self.memory = self.new_memory(1)
        self.enabled = True
        self.arrived: tuple[Tensor, Tensor] | None = None
        self.last_lookup: Lookup | None = None

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

    def new_memory(self, rows: int) -> KNNMemory:
        options, shape = self.options, self._shape
        return KNNMemory(
            shape.width,
            options.max_memories,
            rows,
            num_kv_heads=shape.kv_heads,
            dtype=shape.dtype if options.dtype is None else options.dtype,
            device=shape.device if options.device is None else torch.device(options.device),
            index=options.index,
            directory=options.directory,
        )

    def use_memory(self, memory: KNNMemory) -> None:
        """Remember in this one from now on, and close the one before."""
        self.memory.cleanup()
        self.memory, self.last_lookup = memory, None

    @property
    def num_bytes(self) -> int:
        """What the entries take: keys, values, origins and ages."""
        store = self.memory.store
        per_entry = 2 * self._shape.kv_heads * self._shape.width * store.keys.itemsize + 32
        return per_entry * sum(self.memory.num_entries)

    def begin_call(self, batch: int) -> None:
        """Forget the last call. Raises ValueError for a batch that the rows of the memory cannot serve."""
        self.last_lookup = None
        rows = len(self.reading.rows)
        if batch % rows:
            raise ValueError(f"expected a batch that is a multiple of the {rows} rows of the memory, got {batch}")

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to look up."""
        off = not self.enabled or self.memory.is_closed
        return off or not any(self.memory.num_entries[row] for row in self.reading.rows)

    def look_up(self, query: Tensor) -> OfBatch:
        """query (B, H, T, D) -> what was found for each row of the batch."""
        with self.memory.at_batch_indices(self.reading.rows):
            self.last_lookup = self.memory.look_up(self._grouped(query.detach()), self.options.topk)
        return OfBatch(self.last_lookup, query.shape)

    def stage(self, keys: Tensor, values: Tensor, mask: Tensor, origins: Tensor) -> StagedEntries:
        """Keys and values (R, G, N, D) where mask (R, N) is True, as they can be stored: storing nothing yet."""
        with self.memory.at_batch_indices(self.reading.rows):
            return self.memory.stage(torch.stack((keys, values.to(keys)), dim=-2), mask, origins)

    def of_rows(self, numbers: Tensor, batch: int) -> Tensor:
        """(R,) -> (B,): each row of the memory serves as many rows of the batch, one after the other."""
        return numbers.repeat_interleave(batch // len(numbers))

    def _grouped(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (R, H, B / R * T, D)."""
        rows, (batch, heads, count, size) = len(self.reading.rows), x.shape
        return x.view(rows, batch // rows, heads, count, size).transpose(1, 2).reshape(rows, heads, -1, size)


class OfBatch:
    """What the rows of a batch found, several of which may share a row of the memory: (B, H, T, K)."""

    def __init__(self, lookup: Lookup, shape: tuple[int, ...]) -> None:
        self._lookup, self._shape = lookup, shape
        self.slots, self.scores, self.mask = map(self._of_batch, (lookup.slots, lookup.scores, lookup.mask))

    def tables(self) -> list[Table]:
        """As `Lookup.tables`."""
        return [
            Table(keys, values, self._of_batch(slots), None if mask is None else self._of_batch(mask))
            for keys, values, slots, mask in self._lookup.tables()
        ]

    def _of_batch(self, x: Tensor) -> Tensor:
        """(R, H, B / R * T, K) -> (B, H, T, K)."""
        batch, heads, count, _ = self._shape
        rows = len(x)
        return x.view(rows, heads, batch // rows, count, -1).transpose(1, 2).reshape(batch, heads, count, -1)
