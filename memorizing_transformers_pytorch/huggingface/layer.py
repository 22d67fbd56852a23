"""What layers with a memory have in common.

Shapes: B rows of the batch, R rows of the memory, H query heads, G key/value heads, T queries, K retrieved, D head
width, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from memorizing_transformers_pytorch.huggingface.calls import Call, Found, Shared, deepcopied, refuse_in_backward
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.entries import POSITION, StagedEntries, Vectors
from memorizing_transformers_pytorch.memory.lease import Lookup
from memorizing_transformers_pytorch.memory.policy import OLDEST, POLICIES
from memorizing_transformers_pytorch.model.checkpoint import check_dtypes, read_weights


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Those of `attach_memory` that say what is kept and where. Raises ValueError for what makes no sense."""

    max_memories: int
    chunk: int
    write: str
    window: int | None
    dtype: torch.dtype | None
    device: torch.device | str | None
    index: str
    policy: str
    directory: str | Path | None

    def __post_init__(self) -> None:
        self.check_numbers(max_memories=1, chunk=1)
        self.check_choices(write=("read", "window"), policy=POLICIES)
        if self.window is not None:
            self.check_numbers(window=0)
        if (self.write == "window") != (self.window is not None) or (self.window is not None and self.window < 2):
            raise ValueError(f"expected a window of at least 2 with write='window' alone, got {self.window}")

    def check_numbers(self, **least: int) -> None:
        """Raises ValueError unless these are whole numbers, and no less than that."""
        for name, smallest in least.items():
            value = getattr(self, name)
            if type(value) is not int:
                raise ValueError(f"expected {name} to be a whole number, got {value!r}")
            if value < smallest:
                raise ValueError(f"expected {name} to be at least {smallest}, got {value}")

    def check_choices(self, **choices: tuple[str, ...]) -> None:
        """Raises ValueError for anything that is not among these."""
        for name, some in choices.items():
            if getattr(self, name) not in some:
                raise ValueError(f"expected {name} to be one of {some}, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Options(StoreOptions):
    """Those of `attach_memory` with retrieve="tokens"."""

    topk: int
    combine: str
    positions: str
    distance: int
    recent: int | None
    skip_first: int

    def __post_init__(self) -> None:
        self.check_numbers(topk=1, distance=0, skip_first=0)
        if self.recent is not None:
            self.check_numbers(recent=1)
        super().__post_init__()
        if self.skip_first >= self.chunk:
            raise ValueError(f"expected skip_first to be below chunk={self.chunk}, got {self.skip_first}")
        self.check_choices(combine=("softmax", "gate"), positions=("true", "constant"))


@dataclass(frozen=True)
class Shape:
    """Of the entries of a layer: key/value heads G, head width D, and where and how they are stored unless told."""

    kv_heads: int
    width: int
    device: torch.device
    dtype: torch.dtype


class Entries(NamedTuple):
    """Keys and values (R, G, N, D) of one layer, which of them to store (R, N), and their origins (R, N, 3)."""

    keys: Tensor
    values: Tensor
    mask: Tensor
    origins: Tensor


class BaseLayer:
    """A layer with a memory. index: its number. module: of the model, to which it is attached. holds_what_others_do:
    whether all layers hold the same tokens in the same places."""

    holds_what_others_do = False

    def __init__(self, index: int, module: nn.Module, shape: Shape, options: StoreOptions, shared: Shared) -> None:
        self.index, self.module, self.options, self.shared = index, module, options, shared
        self._shape = shape

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseLayer:
        return deepcopied(self, self.shared.model, memo)

    def attach(self) -> None:
        """Take part in the model from now on, if the layer does."""

    def detach(self) -> None:
        """Undo `attach`."""

    def parameters(self) -> list[nn.Parameter]:
        """What was added to the model, to be learned."""
        return []

    @property
    def memories(self) -> list[KNNMemory]:
        """What it remembers; new entries enter the first."""
        return self.shared.state.memories[self.index]

    @property
    def num_entries(self) -> tuple[int, ...]:
        """Of each row."""
        return tuple(map(sum, zip(*(memory.num_entries for memory in self.memories), strict=True)))

    @property
    def num_bytes(self) -> int:
        """What the entries take: keys, values, and what is known of them."""
        return sum(sum(memory.num_entries) * memory.store.sizes.bytes_per_entry for memory in self.memories)

    @property
    def arrangement(self) -> str:
        """How entries lie in the memories; what was saved can be used where it is the same."""
        return "as they were"

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

    def check_memories(self, memories: list[KNNMemory]) -> None:
        """Raises ValueError for memories that cannot be those of this layer."""
        expected = self._shape.kv_heads, self._shape.width
        for memory in memories:
            if (got := (memory.num_kv_heads, memory.dim)) != expected:
                raise ValueError(f"expected key/value heads and width {expected} in layer {self.index}, got {got}")

    def stage(self, memories: list[KNNMemory], entries: Entries, rows: list[int]) -> StagedEntries:
        """Entries of these rows, as they can be stored: storing nothing yet."""
        keys, values, mask, origins = entries
        return memories[0].stage(torch.stack((keys, values.to(keys)), dim=-2), mask, origins, rows=rows)

    def commit(self, memories: list[KNNMemory], entries: StagedEntries) -> None:
        """Store what `stage` has checked."""
        memories[0].commit(entries)

    def demote(self, memories: list[KNNMemory], row: int, place: int) -> None:
        """Move entries that stand too far before this place for what the layer does with recent ones."""

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
        origins[..., 0] += numbers
        origins[..., POSITION] += places
        return StagedEntries([row], keys, values, origins, None)

    def _moved(self, entries: StagedEntries, places: int, part: int) -> StagedEntries:
        """Entries of one of the memories, as they lie in the last one when they stand so many places later."""
        return entries

    def running_call(self) -> Call | None:
        """The call of the model in which the layer runs. Raises ValueError where there is none: in a backward pass, or
        where a part of the model runs by itself, if something would be looked up."""
        call = self.shared.call.now
        if call is None:
            refuse_in_backward()
            if any(map(any, (memory.num_entries for memory in self.memories if not memory.is_closed))):
                raise ValueError(
                    "a layer with a memory runs outside of a call of its model: call the model, or detach()"
                )
        return call

    def found(self, call: Call) -> Found:
        """What this layer finds in a call: the same whenever it runs in it (again, with gradient checkpointing)."""
        if self.index not in call.found:
            memories = [
                memory if call.enabled and holds_any(memory, call.rows) else None
                for memory in call.memories[self.index]
            ]
            counts = [[memory.num_entries[row] for row in call.rows] for memory in memories if memory is not None]
            call.found[self.index] = Found(memories, counts, [None] * len(memories))
        return call.found[self.index]

    def look_up(self, call: Call, queries: list[Tensor], topk: int) -> list[tuple[Tensor, Lookup]]:
        """Queries (B, H, T, D) for each of the memories -> those for memories that hold something, and what each row of
        the batch found there."""
        found = self.found(call)
        for i, (memory, query) in enumerate(zip(found.memories, queries, strict=True)):
            if memory is not None and found.lookups[i] is None:
                grouped = grouped_by_row(query.detach(), len(call.rows))
                found.lookups[i] = memory.look_up(grouped, topk, rows=call.rows)
        pairs = zip(queries, found.lookups, strict=True)
        return [(query, of_batch(lookup, query)) for query, lookup in pairs if lookup is not None]


def holds_any(memory: KNNMemory, rows: list[int]) -> bool:
    return not memory.is_closed and any(memory.num_entries[row] for row in rows)


def of_rows(numbers: list[int] | list[float], batch: int, like: Tensor) -> Tensor:
    """A number for each of R rows -> (B,): each of them serves as many rows of the batch, one after the other."""
    return torch.tensor(numbers, device=like.device).repeat_interleave(batch // len(numbers))


def grouped_by_row(x: Tensor, rows: int) -> Tensor:
    """(B, H, T, D) -> (R, H, B / R * T, D)."""
    batch, heads, count, size = x.shape
    if rows == batch:
        return x
    return x.view(rows, batch // rows, heads, count, size).transpose(1, 2).reshape(rows, heads, -1, size)


def of_batch(lookup: Lookup, query: Tensor) -> Lookup:
    """(R, H, B / R * T, K) -> (B, H, T, K): the reverse of `grouped_by_row`, for what was found with these queries."""
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


def save_parameters(layers: Mapping[int, BaseLayer], path: str | Path) -> None:
    """Write the parameters of these layers to a safetensors file."""
    save_file({name: each.detach().cpu().contiguous() for name, each in _named(layers).items()}, path)


def load_parameters(layers: Mapping[int, BaseLayer], path: str | Path) -> None:
    """Take them from such a file. Raises ValueError, changing nothing, for those of other layers, and for a file that
    is missing or damaged."""
    found, own = read_weights(path), _named(layers)
    expected = {name: tuple(each.shape) for name, each in own.items()}
    got = {name: tuple(each.shape) for name, each in found.items()}
    if got != expected:
        raise ValueError(f"expected parameters of the shapes {expected}, got {got}")
    check_dtypes(found)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])


def _named(layers: Mapping[int, BaseLayer]) -> dict[str, nn.Parameter]:
    return {f"{index}.{i}": each for index, layer in layers.items() for i, each in enumerate(layer.parameters())}
