"""Copies of memories hold what the memory held, and neither changes the other: in this process and in others."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from memorizing_transformers_pytorch import KNNMemory, KNNMemoryList

DIM = 5


def make(kind: str, folder: Path) -> KNNMemoryList:
    """Memories of two layers, with a row whose ring has turned, one half full and one empty."""
    options = {"dtype": torch.int8} if kind == "codes" else {}
    directory = folder / "mapped" if kind == "memory-mapped" else None
    memories = KNNMemoryList(
        KNNMemory(DIM, 7, 3, num_kv_heads=2, index=index, directory=directory, **options)
        for index in ("exact", "IVF2,Flat")
    )
    for rows, count in (([0], 11), ([1], 4)):
        with memories.at_batch_indices(rows):
            origins = torch.arange(count * 3).view(1, count, 3)
            memories.add([torch.randn(1, 2, count, 2, DIM) for _ in memories], origins=origins)
    memories.ledger.grow(memories.ledger.begin("a book", 0, 0), 11)
    memories.fingerprint, memories.extra = "abc", {"kind": "a test"}
    if kind in ("opened", "opened and changed"):
        memories.save(folder / "memory")
        memories = KNNMemoryList.load(folder / "memory", mmap=True)
    if kind == "opened and changed":
        memories.forget([12])
    return memories


KINDS = ["in RAM", "codes", "memory-mapped", "opened", "opened and changed"]
WAYS: dict[str, Callable[[KNNMemoryList], KNNMemoryList]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda memories: pickle.loads(pickle.dumps(memories)),
}


def contents(memories: KNNMemoryList) -> list[object]:
    """Everything that is remembered, in order."""
    held: list[object] = [memories.ledger.documents(), memories.ledger.next_number]
    for memory in memories:
        for row in range(memory.num_indices):
            places = memory.store.places_in_order(row)
            held += [each.tolist() for _, each in sorted(memory.store.picked(row, places).items())]
    return held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_copy_holds_what_the_memory_held_and_neither_changes_the_other(
    way: Callable[[KNNMemoryList], KNNMemoryList], kind: str, tmp_path: Path
) -> None:
    memories = make(kind, tmp_path)
    before = contents(memories)
    other = way(memories)
    assert contents(other) == before
    assert (other.fingerprint, other.extra) == (memories.fingerprint, memories.extra)
    queries = torch.randn(3, 2, 4, DIM)
    for memory, copied in zip(memories, other, strict=True):
        found, expected = copied.search(queries, 3), memory.search(queries, 3)
        assert torch.equal(found[0], expected[0])
        assert repr(copied) == repr(memory)
    other.add([torch.randn(3, 2, 9, 2, DIM) for _ in other])
    other.clear_memory(1)
    assert contents(memories) == before
    changed = contents(other)
    memories.forget([6, 9])
    memories.add([torch.randn(3, 2, 5, 2, DIM) for _ in memories])
    assert contents(other) == changed
    memories.cleanup()
    assert contents(other) == changed
    other.resize(3)
    other.cleanup()


@pytest.mark.parametrize("kind", ["memory-mapped", "opened"])
def test_a_pickle_of_files_carries_their_paths(kind: str, tmp_path: Path) -> None:
    memories = KNNMemoryList([KNNMemory(64, 2_000, directory=tmp_path / "mapped" if kind == "memory-mapped" else None)])
    memories.add([torch.randn(1, 2_000, 2, 64)])
    if kind == "opened":
        memories.save(tmp_path / "memory")
        memories = KNNMemoryList.load(tmp_path / "memory", mmap=True)
    assert len(pickle.dumps(memories)) < 10_000
    memories[0].cleanup()


def test_what_a_copy_adds_is_saved_apart(tmp_path: Path) -> None:
    memories = make("in RAM", tmp_path)
    memories.save(tmp_path / "memory")
    other = pickle.loads(pickle.dumps(memories))
    other.add([torch.randn(3, 2, 2, 2, DIM) for _ in other])
    other.save(tmp_path / "memory")
    assert contents(KNNMemoryList.load(tmp_path / "memory")) == contents(other)
    memories.add([torch.randn(3, 2, 1, 2, DIM) for _ in memories])
    with pytest.raises(ValueError, match="something else"):  # the folder holds what the copy has saved
        memories.save(tmp_path / "memory")


def test_torch_saves_memories_beside_other_things(tmp_path: Path) -> None:
    memories = make("in RAM", tmp_path)
    file = io.BytesIO()
    torch.save({"memories": memories, "step": 3}, file)
    file.seek(0)
    assert contents(torch.load(file, weights_only=False)["memories"]) == contents(memories)


class Neighbours(Dataset[Tensor]):
    """Looks something up for each item, as a data loader may."""

    def __init__(self, memories: KNNMemoryList) -> None:
        self.memories = memories

    def __len__(self) -> int:
        return 2

    def __getitem__(self, item: int) -> Tensor:
        torch.set_num_threads(1)
        return self.memories[0].retrieve(torch.ones(3, 2, 1, DIM), topk=2).scores


@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_get_the_memory(how: str, tmp_path: Path) -> None:
    memories = make("in RAM", tmp_path)
    expected = memories[0].retrieve(torch.ones(3, 2, 1, DIM), topk=2).scores
    loader = DataLoader(Neighbours(memories), batch_size=None, num_workers=1, multiprocessing_context=how)
    assert all(torch.equal(scores, expected) for scores in loader)
