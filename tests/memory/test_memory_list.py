"""The memories of a model change together: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList

DIM, CAPACITY, ROWS = 3, 7, 3


@pytest.fixture
def memories() -> KNNMemoryList:
    """Two memories with two entries in each row."""
    memories = KNNMemoryList(KNNMemory(DIM, CAPACITY, ROWS) for _ in range(2))
    memories.add([entries(2), entries(2)])
    return memories


def entries(count: int, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, count, 2, DIM)


def num_entries(memories: KNNMemoryList) -> list[tuple[int, ...]]:
    return [memory.num_entries for memory in memories]


def test_each_memory_gets_its_own_entries_and_all_the_same_mask_and_origins() -> None:
    memories = KNNMemoryList(KNNMemory(DIM, CAPACITY, ROWS) for _ in range(2))
    pairs = [entries(3), entries(3)]
    origins = torch.arange(ROWS * 3 * 3).view(ROWS, 3, 3)
    memories.add(pairs, torch.tensor([[False, True, False]] * ROWS), origins)
    for memory, added in zip(memories, pairs, strict=True):
        key_values, mask = memory.search(torch.ones(ROWS, DIM), topk=2)
        assert mask.tolist() == [[True, False]] * ROWS
        assert torch.equal(key_values[:, 0], added[:, 1])
        assert torch.equal(memory.origins(memory.retrieve(torch.ones(ROWS, DIM), 1).slots)[:, 0], origins[:, 1])


def test_a_scope_holds_for_every_memory(memories: KNNMemoryList) -> None:
    with memories.at_batch_indices(row for row in (2, 0)) as scoped:
        assert scoped is memories
        memories.add([entries(1, rows=2), entries(1, rows=2)])
    assert num_entries(memories) == [(3, 2, 3)] * 2
    assert [memory.scoped_indices for memory in memories] == [[0, 1, 2]] * 2


def test_scopes_are_restored_after_an_exception(memories: KNNMemoryList) -> None:
    with memories.at_batch_indices([0, 1]):
        with pytest.raises(ZeroDivisionError), memories.at_batch_indices([2]):
            raise ZeroDivisionError
        assert [memory.scoped_indices for memory in memories] == [[0, 1]] * 2


def test_a_scope_that_one_memory_refuses_holds_for_none() -> None:
    memories = KNNMemoryList([KNNMemory(DIM, CAPACITY, 3), KNNMemory(DIM, CAPACITY, 2)])
    with pytest.raises(ValueError, match="expected distinct rows from 0 to 1, got"), memories.at_batch_indices([2]):
        pass
    assert [memory.scoped_indices for memory in memories] == [[0, 1, 2], [0, 1]]


@pytest.mark.parametrize(
    ("rows", "which", "left"),
    [
        (None, None, [(0, 0, 0), (0, 0, 0)]),
        (1, None, [(2, 0, 2), (2, 0, 2)]),
        ([0, 2], None, [(0, 2, 0), (0, 2, 0)]),
        (None, [1], [(2, 2, 2), (0, 0, 0)]),
        ([2], [0], [(2, 2, 0), (2, 2, 2)]),
        ([], None, [(2, 2, 2), (2, 2, 2)]),
        (None, [], [(2, 2, 2), (2, 2, 2)]),
    ],
    ids=str,
)
def test_clear_memory_empties_these_rows_of_these_memories(
    memories: KNNMemoryList, rows: Any, which: Any, left: list[tuple[int, ...]]
) -> None:
    memories.clear_memory(batch_indices=rows, memory_indices=which)
    assert num_entries(memories) == left


def test_rows_to_clear_may_come_from_an_iterator(memories: KNNMemoryList) -> None:
    memories.clear_memory(batch_indices=iter([0, 1]), memory_indices=iter([1, 0]))
    assert num_entries(memories) == [(0, 0, 2)] * 2


def test_clear_memory_empties_only_rows_in_scope(memories: KNNMemoryList) -> None:
    with memories.at_batch_indices([1]):
        memories.clear_memory()
    assert num_entries(memories) == [(2, 0, 2)] * 2


BAD_CALLS: dict[str, Callable[[KNNMemoryList], object]] = {
    "entries for one memory": lambda memories: memories.add([entries(1)]),
    "entries for three memories": lambda memories: memories.add([entries(1)] * 3),
    "wrong shape in the last": lambda memories: memories.add([entries(1), entries(1, rows=2)]),
    "NaN in the last": lambda memories: memories.add([entries(1), entries(1) * float("nan")]),
    "mask that fits the first only": lambda memories: memories.add(
        [entries(1), entries(2)], mask=torch.ones(ROWS, 1, dtype=torch.bool)
    ),
    "rows out of range": lambda memories: memories.clear_memory([0, ROWS]),
    "memories out of range": lambda memories: memories.clear_memory(memory_indices=[0, 2]),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_what_one_memory_refuses_changes_none(memories: KNNMemoryList, call: Callable[[KNNMemoryList], object]) -> None:
    before = [memory.store.keys.floats().clone() for memory in memories]
    with pytest.raises(ValueError, match=r"expected .*, got "):
        call(memories)
    assert num_entries(memories) == [(2, 2, 2)] * 2
    assert all(torch.equal(memory.store.keys.floats(), keys) for memory, keys in zip(memories, before, strict=True))


@pytest.mark.parametrize(
    "change",
    [lambda memories: memories.add([entries(1), entries(1)]), lambda memories: memories.clear_memory()],
    ids=["add", "clear"],
)
def test_where_one_memory_is_closed_none_changes(
    memories: KNNMemoryList, change: Callable[[KNNMemoryList], object]
) -> None:
    memories[1].cleanup()
    with pytest.raises(ValueError, match="closed by cleanup"):
        change(memories)
    assert memories[0].num_entries == (2, 2, 2)


def test_clearing_rows_that_one_memory_lacks_changes_none() -> None:
    memories = KNNMemoryList([KNNMemory(DIM, CAPACITY, 3), KNNMemory(DIM, CAPACITY, 2)])
    memories[0].add(entries(2))
    with pytest.raises(ValueError, match="expected distinct rows from 0 to 1, got"):
        memories.clear_memory([2])
    assert memories[0].num_entries == (2, 2, 2)


def test_cleanup_removes_the_files_of_every_memory(tmp_path: Path) -> None:
    memories = KNNMemoryList(KNNMemory(DIM, CAPACITY, directory=tmp_path) for _ in range(3))
    assert len(list(tmp_path.iterdir())) == 3
    memories.cleanup()
    memories.cleanup()
    assert list(tmp_path.iterdir()) == []


def test_a_with_block_removes_the_files_also_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        raise_inside(KNNMemory(DIM, CAPACITY, directory=tmp_path), tmp_path, folders=1)
    with pytest.raises(RuntimeError, match="stop"):
        raise_inside(KNNMemoryList(KNNMemory(DIM, CAPACITY, directory=tmp_path) for _ in range(3)), tmp_path, folders=3)
    assert list(tmp_path.iterdir()) == []


def raise_inside(memories: KNNMemory | KNNMemoryList, directory: Path, folders: int) -> None:
    with memories:
        assert len(list(directory.iterdir())) == folders
        raise RuntimeError("stop")
