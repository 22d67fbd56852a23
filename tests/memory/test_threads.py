"""Threads that read while one writes see a memory before or after each change; forked processes have their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from memorizing_transformers_pytorch import KNNMemory
from memorizing_transformers_pytorch.memory import KNNMemoryList

DIM, SECONDS = 6, 1.5


def marked(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Entries whose key, value and origin are one number in each place."""
    numbers = torch.arange(first, first + count).float()
    pairs = numbers.view(1, count, 1, 1).expand(1, count, 2, DIM).clone()
    return pairs, numbers.long().view(1, count, 1).expand(1, count, 3)


def check_whole(memory: KNNMemory) -> None:
    """All that is found is one entry: key and value fit each other."""
    found, mask = memory.search(torch.randn(1, 5, DIM), 7)
    there = found[mask]
    assert bool((there == there[:, :1, :1]).all())


def run_beside(writing: Callable[[], None], reading: Callable[[], None]) -> None:
    """One thread writes, three read, for a while; what any of them raises is raised."""
    errors: list[BaseException] = []
    until = time.monotonic() + SECONDS

    def repeat(action: Callable[[], None]) -> None:
        try:
            while time.monotonic() < until and not errors:
                action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(action,)) for action in (writing, reading, reading, reading)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("index", ["exact", "IVF4,Flat"])
@pytest.mark.parametrize("policy", ["oldest", "by-document"])
def test_readers_never_see_half_of_a_change(index: str, policy: str) -> None:
    memory, first = KNNMemory(DIM, 300, index=index, policy=policy), 0

    def write() -> None:
        nonlocal first
        memory.add(*marked(first, 70)[:1], origins=marked(first, 70)[1])
        first += 70
        memory.forget([first - 3, first - 50])
        if first % 1_400 == 0:
            memory.clear()
        if first % 2_100 == 0:
            memory.resize(200 + first % 300)

    run_beside(write, lambda: check_whole(memory))
    assert first > 0


def test_what_is_saved_beside_writing_is_one_state(tmp_path: Path) -> None:
    memories, first = KNNMemoryList([KNNMemory(DIM, 300), KNNMemory(DIM, 300)]), 0

    def write() -> None:
        nonlocal first
        pairs, origins = marked(first, 11)
        memories.add([pairs, pairs], origins=origins)
        first += 11

    def save() -> None:
        memories.save(tmp_path / "memory")

    run_beside(write, save)
    for each in KNNMemoryList.load(tmp_path / "memory"):
        numbers = [origin.document for origin in each.entries(0)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        held = each.store.picked(0, each.store.places_in_order(0))
        assert held["keys"][0, :, 0].tolist() == numbers


class Searching(Dataset[Tensor]):
    """Looks something up in each item, as a data loader may."""

    def __init__(self, memory: KNNMemory) -> None:
        self.memory = memory

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(1)
        self.memory.add(torch.full((1, 1, 2, DIM), 1e3))  # in the memory of this process alone
        return self.memory.search(torch.ones(1, 1, DIM), 1)[0]


@pytest.mark.parametrize("mmap", [False, True])
def test_forked_workers_use_the_memory_as_it_was(mmap: bool, tmp_path: Path) -> None:
    memory = KNNMemory(DIM, 50)
    memory.add(*marked(0, 20)[:1], origins=marked(0, 20)[1])
    if mmap:
        KNNMemoryList([memory]).save(tmp_path / "memory")
        (memory,) = KNNMemoryList.load(tmp_path / "memory", mmap=True)
    check_whole(memory)
    loader = DataLoader(Searching(memory), num_workers=2, multiprocessing_context="fork")
    assert [float(item.max()) for item in loader] == [1e3] * 4
    assert float(memory.search(torch.ones(1, 1, DIM), 1)[0].max()) == 19
