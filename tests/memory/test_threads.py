"""Threads that read while one writes see a memory before or after each change; forked processes have their own."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from memorizing_transformers_pytorch import KNNMemory
from memorizing_transformers_pytorch.attention.ops import NOTHING, memory_attention
from memorizing_transformers_pytorch.memory import KNNMemoryList

DIM, SECONDS = 6, 1.0


def marked(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Entries whose key, value (both in 1024ths) and origin are one number in each place."""
    numbers = torch.arange(first, first + count).float()
    pairs = (numbers / 1024).view(1, count, 1, 1).expand(1, count, 2, DIM).clone()
    return pairs, numbers.long().view(1, count, 1).expand(1, count, 3)


def check_whole(memory: KNNMemory) -> int:
    """All that is found is one entry: key and value fit each other. How many entries were found."""
    found, mask = memory.search(torch.randn(1, 5, DIM), 7)
    there = found[mask]
    assert bool((there == there[:, :1, :1]).all())
    return len(there)


def check_look_up(memory: KNNMemory, *, gradients: bool) -> int:
    """What a look-up has found fits its scores and origins, and attention to it is that to copies, forward and back,
    whatever is written meanwhile. How many entries were found."""
    queries = torch.randn(1, 2, 5, DIM, requires_grad=True)
    with torch.set_grad_enabled(gradients):
        found = memory.look_up(queries, 7)
        out, _ = memory_attention(queries, found, torch.ones(1))
    (table,) = found.tables()
    keys, values = (part.floats()[table.slots] for part in table[:2])
    assert_close((queries.detach().unsqueeze(-2) * keys).sum(dim=-1)[found.mask], found.scores[found.mask])
    assert torch.equal(found.origins()[..., 0][found.mask].float(), 1024 * keys[..., 0][found.mask])
    logits = (queries.unsqueeze(-2) * keys).sum(dim=-1).masked_fill(~found.mask, NOTHING)
    expected = (logits.softmax(dim=-1) * found.mask).unsqueeze(-1).mul(values).sum(dim=-2)
    assert_close(out, expected)
    if gradients:
        towards = torch.randn_like(out)
        own, other = (torch.autograd.grad(each, queries, towards, retain_graph=True)[0] for each in (out, expected))
        # Terms of up to 100 cancel in float32; an entry in the place of another would differ by 0.07 in every key.
        assert_close(own, other, atol=1e-3)
    return int(found.mask.sum())


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


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


READERS: dict[str, Callable[[KNNMemory], int]] = {
    "copies": check_whole,
    "look-ups": lambda memory: check_look_up(memory, gradients=False),
    "look-ups with gradients": lambda memory: check_look_up(memory, gradients=True),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize(("index", "policy"), [("exact", "by-document"), ("IVF4,Flat", "oldest")])
def test_readers_never_see_half_of_a_change(index: str, policy: str, read: Callable[[KNNMemory], int]) -> None:
    memory, first, found = KNNMemory(DIM, 300, index=index, policy=policy), 0, 0

    def write() -> None:
        nonlocal first
        memory.add(*marked(first, 70)[:1], origins=marked(first, 70)[1])
        first = (first + 70) % 4_200
        memory.forget([first - 3, first - 50])
        if first % 1_400 == 0:
            memory.clear()
        if first % 2_100 == 0:
            memory.resize(200 + first % 300)

    def count() -> None:
        nonlocal found
        found += read(memory)

    write()
    count()  # the first operator that is called is slow to load
    run_beside(write, count)
    assert found > 50


def test_what_is_added_while_a_memory_is_resized_is_not_lost() -> None:
    memory, first = KNNMemory(DIM, 5_000), 0

    def write() -> None:
        nonlocal first
        memory.add(marked(first, 1)[0], origins=marked(first, 1)[1])
        first += 1

    def resize() -> None:
        memory.resize(memory.max_memories + 1)

    run_beside(write, resize)
    assert [origin.document for origin in memory.entries(0)] == list(range(first))[-memory.max_memories :]


def test_a_scope_belongs_to_the_thread_that_entered_it() -> None:
    memory = KNNMemory(DIM, 5, num_indices=3)
    seen: list[list[int]] = []
    with memory.at_batch_indices([1]):
        thread = threading.Thread(target=lambda: seen.append(memory.scoped_indices))
        thread.start()
        thread.join()
        inherited = contextvars.copy_context()
        thread = threading.Thread(target=inherited.run, args=(lambda: seen.append(memory.scoped_indices),))
        thread.start()
        thread.join()
    assert seen == [[0, 1, 2], [1]]


def test_lists_that_are_merged_into_each_other_do_not_wait_for_ever() -> None:
    lists = [KNNMemoryList([KNNMemory(DIM, 3), KNNMemory(DIM, 3)]) for _ in range(2)]
    for memories in lists:
        memories.add([torch.randn(1, 2, 2, DIM)] * 2)
    threads = [
        threading.Thread(target=lambda a=a, b=b: [a.merge(b) for _ in range(5)], daemon=True)
        for a, b in (lists, lists[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


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
        assert (1024 * held["keys"][0, :, 0]).tolist() == numbers


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
    assert float(memory.search(torch.ones(1, 1, DIM), 1)[0].max()) == 19 / 1024
