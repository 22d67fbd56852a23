"""Memories out of memories: on another device, some documents of them, other rows, two in one.

Shapes: M capacity of each row, N entries of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from memorizing_transformers_pytorch.memory.disk.save import Marks
from memorizing_transformers_pytorch.memory.knn_memory import KNNMemory
from memorizing_transformers_pytorch.memory.ledger import held
from memorizing_transformers_pytorch.memory.store import Store


def memory_with(store: Store, index: str, policy: str) -> KNNMemory:
    """A memory of what is in a store, searched exactly where the index cannot work on its device."""
    sizes = store.sizes
    memory = KNNMemory(
        sizes.dim,
        1,
        sizes.rows,
        num_kv_heads=sizes.kv_heads,
        dtype=sizes.dtype,
        device=store.device,
        index=index if store.device.type == "cpu" or index == "auto" else "exact",
        policy=policy,
    )
    memory.replace_store(store)
    return memory


def copied(memory: KNNMemory, device: torch.device, documents: Iterable[int] | None = None) -> KNNMemory:
    """A memory of the same kind on a device, with the entries of some documents, or all."""
    chosen = None if documents is None else torch.tensor(sorted(set(documents)), dtype=torch.int64)
    new = Store(memory.store.sizes, device, None)
    for row in range(memory.num_indices):
        places = memory.store.places_in_order(row)
        if chosen is not None:
            places = places[torch.isin(memory.store.origins[row, places, 0], chosen.to(places.device))]
        new.append(row, {name: part.to(device) for name, part in memory.store.picked(row, places).items()})
    return memory_with(new, memory.index, memory.policy)


def copy_row(memory: KNNMemory, source: int, target: int) -> None:
    """Let a row hold what another does, and nothing else."""
    entries = memory.store.picked(source, memory.store.places_in_order(source))
    memory.store.clear([target])
    memory.searcher.forget([target])
    memory.store.append(target, entries)


def check_like(memories: Sequence[KNNMemory], others: Sequence[KNNMemory]) -> None:
    """Raises ValueError unless the entries of the others could lie in the memories, row by row."""
    own, theirs = ([(m.num_indices, m.num_kv_heads, m.dim, m.dtype) for m in each] for each in (memories, others))
    if own != theirs:
        raise ValueError(f"expected memories with rows, key/value heads, width and dtype {own}, got {theirs}")


def check_nothing_twice(
    own: Sequence[KNNMemory], own_marks: Marks | None, others: Sequence[KNNMemory], other_marks: Marks | None
) -> None:
    """Raises ValueError if both hold documents of the same saved state: a merge would double them."""
    if own_marks is None or other_marks is None or own_marks.state != other_marks.state:
        return
    if held(own) & held(others):
        folders = " and ".join(sorted({repr(str(marks.folder)) for marks in (own_marks, other_marks)}))
        raise ValueError(f"both memories hold documents of the same saved state ({folders}): a merge would double them")


def take_over(memory: KNNMemory, other: KNNMemory, shift: int) -> None:
    """Add the entries of another memory after its own, with document numbers that are so much larger; where they do not
    fit, the capacity grows."""
    needed = max(map(sum, zip(memory.num_entries, other.num_entries, strict=True)))
    if needed > memory.max_memories or memory.store.room < needed:
        memory.replace_store(memory.store.resized(max(needed, memory.max_memories)))
    for row in range(memory.num_indices):
        entries = other.store.picked(row, other.store.places_in_order(row))
        numbers = entries["origins"][:, 0]
        entries["origins"][:, 0] = torch.where(numbers < 0, numbers, numbers + shift)
        memory.store.append(row, {name: part.to(memory.device) for name, part in entries.items()})
