"""A lookup keeps the keys and values it found, however many entries take their place."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory, Lookup
from memorizing_transformers_pytorch.memory.lease import lease_of

DIM, CAPACITY, ROWS, TOPK = 3, 7, 2, 4
by_kv_heads = pytest.mark.parametrize("kv_heads", [1, 3])


def add(memory: KNNMemory, count: int, *, share: float = 1.0) -> None:
    """Add entries to the rows in scope, about this share of them without a mask."""
    rows = len(memory.scoped_indices)
    origins = torch.randint(3, (rows, count, 3))  # of three documents
    memory.add(torch.randn(rows, memory.num_kv_heads, count, 2, DIM), torch.rand(rows, count) < share, origins)


def add_to_last_row(memory: KNNMemory) -> None:
    with memory.at_batch_indices([ROWS - 1]):
        add(memory, 3)


def load(memory: KNNMemory) -> None:
    """Become another memory of the same shape."""
    sizes = {"num_kv_heads": memory.num_kv_heads, "dtype": memory.dtype}
    other = KNNMemory(DIM, memory.max_memories, ROWS, **sizes)
    add(other, 9, share=0.5)
    memory.load_state_dict(other.state_dict())


CHANGES: dict[str, Callable[[KNNMemory], None]] = {
    "add none": lambda memory: add(memory, 0),
    "add one": lambda memory: add(memory, 1),
    "add some": lambda memory: add(memory, 5),
    "add as many as fit": lambda memory: add(memory, CAPACITY),
    "add more than fit": lambda memory: add(memory, 2 * CAPACITY + 3),
    "add with mask": lambda memory: add(memory, 6, share=0.5),
    "add to the last row": add_to_last_row,
    "clear": lambda memory: memory.clear(),
    "clear the first row": lambda memory: memory.clear(0),
    "forget a document": lambda memory: memory.forget([0]),
    "forget other documents": lambda memory: memory.forget([1, 2]),
    "remove the oldest": lambda memory: memory.remove(0, torch.arange(memory.num_entries[0]) < 2),
    "grow": lambda memory: memory.resize(CAPACITY + 4),
    "shrink": lambda memory: memory.resize(CAPACITY - 2),
    "load": load,
}


class Pairs(NamedTuple):
    keys: Tensor
    values: Tensor


class Snapshot(NamedTuple):
    """A lookup and copies, made at the same time, of what it found."""

    lookup: Lookup
    pairs: Pairs
    origins: Tensor


def take_snapshot(memory: KNNMemory) -> Snapshot:
    rows = len(memory.scoped_indices)
    queries = torch.randn(rows, 2 * memory.num_kv_heads, 3, DIM, requires_grad=True)
    key_values, mask = memory.search(queries, TOPK)
    lookup = memory.look_up(queries, TOPK)
    origins = memory.origins(lookup.slots).masked_fill(~mask.unsqueeze(-1), -1)
    return Snapshot(lookup, Pairs(*key_values.unbind(dim=-2)), origins)


def gathered(lookup: Lookup) -> Pairs:
    """Keys and values of everything found, 0 elsewhere."""
    (table,) = lookup.tables()
    assert table.mask is None
    found = lookup.mask.unsqueeze(-1)
    return Pairs(
        *(
            part.at(table.slots.flatten()).floats(torch.float32).view(*found.shape[:-1], DIM) * found
            for part in table[:2]
        )
    )


def assert_kept(snapshot: Snapshot) -> None:
    now = gathered(snapshot.lookup)
    assert torch.equal(now.keys, snapshot.pairs.keys.float())
    assert torch.equal(now.values, snapshot.pairs.values.float())
    assert torch.equal(snapshot.lookup.origins(), snapshot.origins)


@by_kv_heads
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_lookup_survives_a_change(kv_heads: int, change: Callable[[KNNMemory], None]) -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS, num_kv_heads=kv_heads)
    add(memory, CAPACITY)
    snapshot = take_snapshot(memory)
    change(memory)
    assert_kept(snapshot)


@pytest.mark.parametrize("mapped", [False, True], ids=["in RAM", "memory-mapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@by_kv_heads
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(st.sampled_from(sorted(CHANGES)), max_size=9))
def test_lookups_survive_any_changes(kv_heads: int, dtype: torch.dtype, mapped: bool, changes: list[str]) -> None:
    """One lookup before each change, so that each must tell what it has seen from what came later."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        directory = folder if mapped else None
        memory = KNNMemory(DIM, CAPACITY, ROWS, num_kv_heads=kv_heads, dtype=dtype, directory=directory)
        snapshots = []
        for change in changes:
            snapshots.append(take_snapshot(memory))
            CHANGES[change](memory)
        for snapshot in snapshots:
            assert_kept(snapshot)
        memory.cleanup()


def test_entries_are_kept_while_the_ring_turns_many_times() -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS)
    add(memory, CAPACITY)
    snapshot = take_snapshot(memory)
    for _ in range(50):
        add(memory, 3)
        assert_kept(snapshot)


def test_a_lookup_within_a_scope_is_about_its_rows() -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS)
    add(memory, CAPACITY)
    with memory.at_batch_indices([1]):
        snapshot = take_snapshot(memory)
    add(memory, CAPACITY)
    assert_kept(snapshot)


def test_a_lookup_outlives_its_memory(tmp_path: Path) -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS, directory=tmp_path)
    add(memory, CAPACITY)
    snapshot = take_snapshot(memory)
    add(memory, 3)
    memory.cleanup()
    del memory
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert_kept(snapshot)


def test_hidden_rows_find_nothing() -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS, num_kv_heads=3)
    add(memory, CAPACITY)
    lookup = memory.look_up(torch.randn(ROWS, 3, 5, DIM), TOPK, hidden_rows=torch.tensor([True, False]))
    assert lookup.mask.flatten(1).all(dim=1).tolist() == [False, True]
    assert lookup.mask.flatten(1).any(dim=1).tolist() == [False, True]


@by_kv_heads
@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_hidden_tokens_find_nothing(kv_heads: int, num_axes: int) -> None:
    """queries (R, T, D), (R, H, T, D) and (R, H, 2, T, D): hidden (R, T) are those of every head."""
    if num_axes == 1 and kv_heads > 1:
        pytest.skip("queries of several heads have an axis for them")
    memory, hidden = KNNMemory(DIM, CAPACITY, ROWS, num_kv_heads=kv_heads), torch.rand(ROWS, 5) < 0.5
    add(memory, CAPACITY)
    axes = {1: (), 2: (kv_heads,), 3: (kv_heads, 2)}[num_axes]
    lookup = memory.look_up(torch.randn(ROWS, *axes, 5, DIM), TOPK, hidden)
    for row in range(ROWS):
        for t in range(5):
            found = lookup.mask[row, ..., t, :]
            assert not found.any() if hidden[row, t] else found.all()


def test_hidden_rows_stay_hidden_after_they_are_overwritten() -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS)
    add(memory, CAPACITY)
    lookup = memory.look_up(torch.randn(ROWS, 2, 3, DIM), TOPK, hidden_rows=torch.tensor([True, False]))
    add(memory, CAPACITY)
    store, copies = lease_of(lookup.lease).tables(lookup.slots, lookup.mask)
    assert copies.mask is not None
    assert copies.mask.flatten(1).any(dim=1).tolist() == [False, True]
    assert store.mask is not None
    assert torch.equal(store.mask, ~copies.mask)


def copied_by(memory: KNNMemory, lookup: Lookup) -> int:
    """How many entries a look-up has made the memory copy."""
    tables = lease_of(lookup.lease).tables(lookup.slots, lookup.mask)
    assert tables[0].keys.numbers.data_ptr() == memory.store.keys.numbers.data_ptr()
    return sum(len(table.keys) for table in tables[1:])


def test_nothing_is_copied_before_an_entry_is_overwritten() -> None:
    memory = KNNMemory(DIM, CAPACITY, 1)
    add(memory, 4)
    lookup = take_snapshot(memory).lookup
    add(memory, 3)
    memory.clear()
    assert copied_by(memory, lookup) == 0
    add(memory, 1)
    assert copied_by(memory, lookup) == 1


def test_without_gradients_it_keeps_what_it_found_as_well() -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS)
    add(memory, CAPACITY)
    with torch.no_grad():
        snapshot = take_snapshot(memory)
        add(memory, CAPACITY)
        assert_kept(snapshot)


def test_what_changes_twice_is_what_it_was_at_first() -> None:
    memory = KNNMemory(DIM, 1000, 1)
    add(memory, 1000)
    snapshot = take_snapshot(memory)
    for _ in range(3):
        memory.forget([0])
        add(memory, 1000)
    assert_kept(snapshot)


def test_look_ups_that_are_over_cost_nothing() -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS)
    add(memory, CAPACITY)
    first, second = take_snapshot(memory).lookup, take_snapshot(memory).lookup
    assert memory.store.log.is_read
    end = memory.store.log.end
    del first
    add(memory, 1)
    assert end.change is not None  # for the second
    del second
    assert not memory.store.log.is_read
    end = memory.store.log.end
    add(memory, 1)
    assert end.change is None


def test_changes_are_kept_once_and_freed_with_the_last_look_up_that_needs_them() -> None:
    memory = KNNMemory(DIM, CAPACITY, 1)
    add(memory, CAPACITY)
    lookups = [take_snapshot(memory).lookup for _ in range(5)]
    add(memory, 2)
    later = take_snapshot(memory)
    add(memory, 3)
    tables = [lease_of(lookup.lease).tables(lookup.slots, lookup.mask)[1] for lookup in lookups]
    assert [len(table.keys) for table in tables] == [5] * 5
    assert copied_by(memory, later.lookup) == 3
    assert_kept(later)


def test_a_copied_lease_is_refused_when_the_look_up_is_gone() -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS)
    add(memory, CAPACITY)
    copy = memory.look_up(torch.randn(ROWS, 1, 3, DIM), TOPK).lease.clone()
    with pytest.raises(RuntimeError, match="is over"):
        lease_of(copy)


def test_time_spent_in_look_ups_adds_up() -> None:
    memory, queries = KNNMemory(DIM, CAPACITY, ROWS), torch.randn(ROWS, 1, 3, DIM)
    assert memory.seconds_searching == 0
    times = []
    for _ in range(3):
        memory.look_up(queries, TOPK)
        times.append(memory.seconds_searching)
    assert 0 < times[0] < times[1] < times[2] < 10
