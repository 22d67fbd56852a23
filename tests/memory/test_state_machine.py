"""Whatever is called in whatever order, a memory equals a plain list of the last entries of each row.

Shapes: R rows in scope, H query heads, G key/value heads, T queries, K retrieved, D head width, M capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.checks import STORAGE_DTYPES
from memorizing_transformers_pytorch.memory.index import approximate, auto, structure
from tests.amounts import some
from tests.reference import kept

pytestmark = pytest.mark.soak

DIM = 5
COUNTS = st.integers(0, 4) | st.integers(0, 25)


def contents(pairs: Tensor, origin: Tensor) -> tuple[object, ...]:
    """What an entry holds, as something to compare and to look up."""
    return tuple(pairs.flatten().tolist()), tuple(origin.tolist())


@dataclass
class Entry:
    """A key and a value per head (G, 2, D), origin (3,), and a slot per head once they are known."""

    pairs: Tensor
    origin: Tensor
    slots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.contents = contents(self.pairs, self.origin)


class MemoryMachine(RuleBasedStateMachine):
    """Does everything twice: with the memory, and with the lists."""

    def __init__(
        self, dtypes: Sequence[torch.dtype], directories: Sequence[Path | None] = (None,), index: str = "exact"
    ) -> None:
        super().__init__()
        self.dtypes, self.directories, self.index = dtypes, directories, index
        self.tolerance = 1e-2 if "SQ" in index else 1e-5  # an index that rounds keys may take one of two near ties
        self.random = torch.Generator().manual_seed(0)
        self.num_added = 0
        self.scopes: list[tuple[list[int], AbstractContextManager[KNNMemory]]] = []
        self.saved: dict[int, tuple[bytes, list[list[Entry]]]] = {}  # by capacity

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    @property
    def scope(self) -> list[int]:
        return self.scopes[-1][0] if self.scopes else list(range(len(self.lists)))

    @initialize(
        rows=st.sampled_from([1, 3]),
        kv_heads=st.sampled_from([1, 3]),
        capacity=st.sampled_from([1, 5, 11]),
        count=COUNTS,
        data=st.data(),
    )
    def open(self, rows: int, kv_heads: int, capacity: int, count: int, data: st.DataObject) -> None:
        self.kv_heads, self.dtype = kv_heads, data.draw(st.sampled_from(self.dtypes))
        directory = data.draw(st.sampled_from(self.directories))
        self.lists: list[list[Entry]] = [[] for _ in range(rows)]
        self.capacity = capacity
        kind = {"dtype": self.dtype, "directory": directory, "index": self.index}
        self.memory = KNNMemory(DIM, capacity, rows, num_kv_heads=self.kv_heads, **kind)
        self.add(count, masked=True, with_origins=True)

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.cleanup()

    # What changes a memory

    @rule(count=COUNTS, with_origins=st.booleans())
    def add_all(self, count: int, with_origins: bool) -> None:
        self.add(count, masked=False, with_origins=with_origins)

    @rule(count=COUNTS, with_origins=st.booleans())
    def add_some(self, count: int, with_origins: bool) -> None:
        self.add(count, masked=True, with_origins=with_origins)

    def add(self, count: int, masked: bool, with_origins: bool) -> None:
        rows = self.scope
        entries = self.numbers(len(rows), self.kv_heads, count, 2, DIM)
        mask = torch.rand(len(rows), count, generator=self.random) < 0.6
        serial = self.num_added + torch.arange(len(rows) * count).view(len(rows), count)
        origins = torch.stack((serial * 5, serial, serial % 3), dim=-1)
        self.memory.add(entries, mask if masked else None, origins if with_origins else None)

        self.num_added += len(rows) * count
        for i, row in enumerate(rows):
            for n in range(count):
                if mask[i, n] or not masked:
                    origin = origins[i, n] if with_origins else torch.tensor([-1, -1, -1])
                    self.lists[row].append(Entry(kept(entries[i, :, n], self.dtype), origin))
            self.lists[row] = self.lists[row][-self.capacity :]

    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        rows = data.draw(st.none() | st.lists(st.sampled_from(self.scope), unique=True))
        self.memory.clear(rows)
        for row in self.scope if rows is None else rows:
            self.lists[row] = []

    @rule(capacity=st.sampled_from([1, 4, 5, 7, 11, 16]))
    def resize(self, capacity: int) -> None:
        """The newest entries of every row stay, whatever the scope; all get new slots."""
        self.memory.resize(capacity)
        self.capacity = capacity
        self.lists = [[replace(entry, slots=()) for entry in entries[-capacity:]] for entries in self.lists]

    @rule()
    def save(self) -> None:
        state = safetensors.torch.save(self.memory.state_dict())
        self.saved[self.capacity] = (state, [[replace(entry) for entry in entries] for entries in self.lists])

    @precondition(lambda self: self.capacity in self.saved)
    @rule()
    def load(self) -> None:
        """Every entry is again in the slot where it was."""
        state, lists = self.saved[self.capacity]
        self.memory.load_state_dict(safetensors.torch.load(state))
        self.lists = [[replace(entry) for entry in entries] for entries in lists]
        again = self.memory.state_dict()
        assert all(torch.equal(part, again[name]) for name, part in safetensors.torch.load(state).items())

    @rule(data=st.data())
    def enter_scope(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.lists) - 1), min_size=1, unique=True))
        scope = self.memory.at_batch_indices(rows)
        scope.__enter__()
        self.scopes.append((rows, scope))

    @precondition(lambda self: self.scopes)
    @rule(fails=st.booleans())
    def leave_scope(self, fails: bool) -> None:
        _, scope = self.scopes.pop()
        if fails:
            assert not scope.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
        else:
            scope.__exit__(None, None, None)

    # What reads it

    @rule(num_queries=st.integers(0, 5), topk=st.integers(1, 9), group=st.sampled_from([1, 2]), exact=st.booleans())
    def retrieve(self, num_queries: int, topk: int, group: int, exact: bool) -> None:
        dtype = torch.float64 if exact else torch.float32
        queries = self.numbers(len(self.scope), self.kv_heads * group, num_queries, DIM).to(dtype)
        slots, scores, mask = self.memory.retrieve(queries, topk)
        assert slots.shape == scores.shape == mask.shape == (*queries.shape[:-1], topk)
        assert scores.dtype == dtype
        for i, row in enumerate(self.scope):
            for head in range(queries.shape[1]):
                here = (i, head)
                self.check_found(row, head // group, queries[here], slots[here], scores[here], mask[here])

    def check_found(self, row: int, kv_head: int, queries: Tensor, slots: Tensor, scores: Tensor, mask: Tensor) -> None:
        """queries (T, D) -> slots, scores and mask (T, K), against brute force. Ties come in any order."""
        keys_by_slot = {entry.slots[kv_head]: entry.pairs[kv_head, 0] for entry in self.lists[row]}
        num_found = min(slots.shape[-1], len(keys_by_slot))
        assert torch.equal(mask, (torch.arange(slots.shape[-1]) < num_found).expand_as(mask))
        assert not slots[~mask].any()
        assert not scores[~mask].any()
        for query, query_slots, query_scores in zip(queries, slots, scores, strict=True):
            every_score = {slot: float(query.double() @ key.double()) for slot, key in keys_by_slot.items()}
            found = query_slots[:num_found].tolist()
            assert len(set(found)) == num_found
            best = sorted(every_score.values(), reverse=True)[:num_found]
            own = [every_score[slot] for slot in found]
            assert query_scores[:num_found].tolist() == pytest.approx(own, rel=1e-5, abs=1e-5)
            assert own == pytest.approx(best, rel=1e-5, abs=self.tolerance)

    @rule(num_queries=st.integers(0, 5), topk=st.integers(1, 9))
    def search(self, num_queries: int, topk: int) -> None:
        queries = self.numbers(len(self.scope), self.kv_heads, num_queries, DIM)
        slots, _, mask = self.memory.retrieve(queries, topk)
        key_values, search_mask = self.memory.search(queries, topk)
        assert torch.equal(search_mask, mask)
        assert key_values.dtype == kept(queries, self.dtype).dtype
        assert not key_values[~mask].any()
        pairs_by_slot = {
            slot: pairs
            for entries in self.lists
            for entry in entries
            for slot, pairs in zip(entry.slots, entry.pairs, strict=True)
        }
        for slot, pair in zip(slots[mask].tolist(), key_values[mask], strict=True):
            assert torch.equal(pair, pairs_by_slot[slot])

    @invariant()
    def what_is_remembered_equals_the_lists(self) -> None:
        """The same entries with the same origins, in the slots in which they have been since they were added."""
        assert self.memory.scoped_indices == self.scope
        assert self.memory.num_entries == tuple(map(len, self.lists))
        assert self.memory.max_memories == self.capacity
        with self.memory.at_batch_indices(range(len(self.lists))):
            queries = torch.zeros(len(self.lists), self.kv_heads, DIM)
            slots, _, _ = self.memory.retrieve(queries, self.capacity)  # once: ties may come in another order
        key_values = self.memory.store.pairs_of(slots)
        for row, entries in enumerate(self.lists):
            stored = {}
            row_slots, order = slots[row, :, : len(entries)].sort(dim=-1)
            for n in range(len(entries)):
                pairs = torch.stack([key_values[row, head, order[head, n]] for head in range(self.kv_heads)])
                origins = self.memory.origins(row_slots[:, n])
                assert (origins == origins[0]).all()
                stored[contents(pairs, origins[0])] = tuple(row_slots[:, n].tolist())
            assert stored.keys() == {entry.contents for entry in entries}
            for entry in entries:
                assert entry.slots in ((), stored[entry.contents])
                entry.slots = stored[entry.contents]


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_a_memory_equals_a_list_of_the_last_entries_of_each_row(dtype: torch.dtype, tmp_path: Path) -> None:
    """In RAM and memory-mapped."""

    class Machine(MemoryMachine):
        def __init__(self) -> None:
            super().__init__([dtype], [None, tmp_path])

    run(Machine)
    assert list(tmp_path.iterdir()) == []


def run(machine: type[MemoryMachine]) -> None:
    unhurried = [HealthCheck.too_slow]
    examples = settings(
        max_examples=some(12, 500), stateful_step_count=30, deadline=None, suppress_health_check=unhurried
    )
    run_state_machine_as_test(machine, settings=examples)


# Approximate indices: small structures, from the first entries on


@pytest.fixture
def from_the_first_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST_ENTRIES": 1, "LEAST_PER_LIST": 1}.items():
        monkeypatch.setattr(structure, name, value)


@pytest.mark.usefixtures("from_the_first_entries")
@pytest.mark.parametrize("index", ["IVF2,Flat", "IVF3,SQfp16"])
def test_an_approximate_index_that_looks_at_all_equals_the_list_too(
    monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    """With every list probed these leave nothing out: they follow the ring exactly."""
    monkeypatch.setattr(approximate, "TARGET_RECALL", 1.1)
    monkeypatch.setattr(approximate, "WORTHWHILE", -1.0)

    class Machine(MemoryMachine):
        def __init__(self) -> None:
            super().__init__([torch.float16, torch.int8], index=index)

    run(Machine)


@pytest.mark.usefixtures("from_the_first_entries")
@pytest.mark.parametrize("index", ["IVF3,Flat", "IVF2,SQ8", "auto"])
def test_an_approximate_index_may_miss_entries_but_finds_no_wrong_ones(
    monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    monkeypatch.setattr(approximate, "TARGET_RECALL", 0.0)
    for name, value in {"THRESHOLD": 4, "LEAST_PRODUCTS": 0, "LARGEST_SHARE": 1}.items():
        monkeypatch.setattr(auto, name, value)

    class Machine(MemoryMachine):
        def __init__(self) -> None:
            super().__init__([torch.float32, torch.int8], index=index)

        def check_found(
            self, row: int, kv_head: int, queries: Tensor, slots: Tensor, scores: Tensor, mask: Tensor
        ) -> None:
            keys = {entry.slots[kv_head]: entry.pairs[kv_head, 0] for entry in self.lists[row]}
            num_found = min(slots.shape[-1], len(keys))
            assert torch.equal(mask, (torch.arange(slots.shape[-1]) < num_found).expand_as(mask))
            assert not slots[~mask].any()
            assert not scores[~mask].any()
            for query, query_slots, query_scores in zip(queries, slots, scores, strict=True):
                found = query_slots[:num_found].tolist()
                assert len(set(found)) == num_found
                true = [float(query.double() @ keys[slot].double()) for slot in found]
                assert query_scores[:num_found].tolist() == pytest.approx(true, rel=1e-5, abs=1e-5)
                assert true == pytest.approx(sorted(true, reverse=True), rel=1e-5, abs=1e-5)

    run(Machine)
