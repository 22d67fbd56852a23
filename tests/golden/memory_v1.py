"""The memory in tests/golden/memory-v1, which every later version must be able to load.

    python -m tests.golden.memory_v1

has written it, with version 1 of the format; it is never written again. It has tables, a clock and a policy ("least
attended") that are ignored today.
"""

from __future__ import annotations

from pathlib import Path

import torch

from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList

FOLDER = Path(__file__).parent / "memory-v1"


def expected() -> KNNMemoryList:
    """What is in it, made anew: three memories of two rows, the second of which has turned once."""
    memories = KNNMemoryList(
        [
            KNNMemory(4, 40, 2, num_kv_heads=2),
            KNNMemory(3, 6, 2, dtype=torch.bfloat16),
            KNNMemory(5, 30, 2, dtype=torch.int8, policy="by-document", index="auto"),
        ]
    )
    memories.fingerprint, memories.extra = "of no weights", {"kind": "golden"}
    add(memories, "first", 20)
    return memories


def add(memories: KNNMemoryList, title: str, count: int) -> None:
    """A document in each row; numbers that bfloat16 can hold."""
    for row in range(2):
        number = memories.ledger.begin(title, row, 0, {"file": f"{title}.txt"})
        origins = torch.tensor([[[number, place, 10 * row + place] for place in range(count)]])
        for memory in memories:
            size = memory.num_kv_heads * count * 2 * memory.dim
            numbers = (torch.arange(size) % 64 + number).float() / 8
            with memory.at_batch_indices([row]):
                memory.add(numbers.view(1, memory.num_kv_heads, count, 2, memory.dim), origins=origins)
        memories.ledger.grow(number, count)


def add_more(memories: KNNMemoryList) -> None:
    """What the journal has; the second memory evicted its two oldest entries and closed up."""
    for row in range(2):
        store = memories[1].store
        gone = torch.zeros(store.filled[row], dtype=torch.bool)
        gone[store.places_in_order(row)[:2]] = True
        memories[1].remove(row, gone)
    add(memories, "second", 2)


if __name__ == "__main__":
    made = expected()
    made.save(FOLDER)
    add_more(made)
    made.save(FOLDER)
    (FOLDER / ".lock").unlink(missing_ok=True)
