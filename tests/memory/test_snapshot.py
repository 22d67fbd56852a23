"""The state of a memory is exactly what it holds and will overwrite; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList, NonFiniteError
from memorizing_transformers_pytorch.memory.checks import STORAGE_DTYPES

DIM, CAPACITY, ROWS, HEADS = 3, 7, 3, 2

State = dict[str, Tensor]


def make(**changes: object) -> KNNMemory:
    fields = {"dim": DIM, "max_memories": CAPACITY, "num_indices": ROWS, "num_kv_heads": HEADS}
    return KNNMemory(**{**fields, **changes})


def add(memory: KNNMemory, count: int) -> None:
    rows = memory.num_indices
    mask, origins = torch.rand(rows, count) < 0.7, torch.randint(99, (rows, count, 3))
    memory.add(torch.randn(rows, memory.num_kv_heads, count, 2, memory.dim), mask, origins)


def used(**changes: object) -> KNNMemory:
    """A memory whose rings stand at different places, one of them not full and one empty."""
    memory = make(**changes)
    add(memory, 17)
    memory.clear([1, 2])
    with memory.at_batch_indices([1]):
        memory.add(torch.randn(1, memory.num_kv_heads, 4, 2, memory.dim))
    return memory


def assert_equal_states(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    for name, part in left.items():
        assert part.dtype == right[name].dtype
        assert torch.equal(part, right[name])


@pytest.mark.parametrize("mapped", [False, True], ids=["in RAM", "memory-mapped"])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_a_restored_memory_goes_on_as_the_saved_one(dtype: torch.dtype, mapped: bool, tmp_path: Path) -> None:
    memory, other = used(dtype=dtype), make(dtype=dtype, directory=tmp_path if mapped else None)
    add(other, 5)
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(memory.state_dict())))
    assert len(list(tmp_path.iterdir())) == mapped
    for count in (0, 3, 2, 9):
        for each in (memory, other):
            torch.manual_seed(count)
            add(each, count)
        assert_equal_states(memory.state_dict(), other.state_dict())
        queries = torch.randn(ROWS, HEADS, 4, DIM)
        assert all(
            torch.equal(a, b) for a, b in zip(memory.retrieve(queries, 5), other.retrieve(queries, 5), strict=True)
        )
    other.cleanup()
    assert list(tmp_path.iterdir()) == []


def test_the_state_holds_the_filled_places_only_and_is_a_copy() -> None:
    memory = used()
    state = memory.state_dict()
    assert state["filled"].tolist() == [7, 4, 0]
    assert {name: tuple(part.shape) for name, part in state.items() if name in ("keys", "origins")} == {
        "keys": (HEADS, 11, DIM),
        "origins": (11, 3),
    }
    before = {name: part.clone() for name, part in state.items()}
    add(memory, 20)
    assert_equal_states(state, before)
    assert all(part.is_contiguous() for part in state.values())


def test_what_older_versions_saved_too_is_ignored() -> None:
    memory, other = used(), make()
    other.load_state_dict({**memory.state_dict(), "written": torch.ones(11), "clock": torch.tensor(9)})
    assert_equal_states(memory.state_dict(), other.state_dict())


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], State]:
    return lambda state: {**state, name: change(state[name].clone())}


def put(name: str, place: int, number: float) -> Callable[[State], State]:
    def change(part: Tensor) -> Tensor:
        part.view(-1)[place] = number
        return part

    return changed(name, change)


FAULTS: dict[str, Callable[[State], State]] = {
    "no keys": lambda state: {name: part for name, part in state.items() if name != "keys"},
    "another part": lambda state: {**state, "scores": torch.zeros(1)},
    "nothing": lambda _state: {},
    "fewer keys": changed("keys", lambda keys: keys[:, 1:]),
    "wider values": changed("values", lambda values: values.repeat(1, 1, 2)),
    "another dtype": changed("values", Tensor.double),
    "fewer origins": changed("origins", lambda origins: origins[1:]),
    "short origins": changed("origins", lambda origins: origins[:, 1:]),
    "another capacity's shape": changed("capacity", lambda capacity: capacity.expand(2)),
    "a row too many": changed("filled", lambda filled: torch.cat((filled, filled[-1:]))),
    "overfull": lambda state: {**state, "filled": torch.tensor([8, 3, 0])},
    "negative": lambda state: {**state, "filled": torch.tensor([7, 5, -1])},
    "cursor beyond": put("cursors", 0, CAPACITY),
    "cursor before": put("cursors", 0, -1),
    "cursor not behind": put("cursors", 1, 2),
    "NaN": put("keys", 2, float("nan")),
    "infinity": put("values", 2, float("inf")),
    "another capacity": lambda _state: used(max_memories=9).state_dict(),
    "other heads": lambda _state: used(num_kv_heads=1).state_dict(),
    "other rows": lambda _state: used(num_indices=4).state_dict(),
    "other width": lambda _state: used(dim=4).state_dict(),
    "half": lambda _state: used(dtype=torch.float16).state_dict(),
    "codes": lambda _state: used(dtype=torch.int8).state_dict(),
    "scales": lambda state: {**state, "key_scales": torch.ones(HEADS, 11)},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(fault: Callable[[State], State]) -> None:
    memory = used()
    before, store = memory.state_dict(), memory.store
    with pytest.raises(ValueError, match=r"(?s)^expected .*got"):
        memory.load_state_dict(fault(before))
    assert memory.store is store
    assert_equal_states(memory.state_dict(), before)


FAULTS_OF_CODES: dict[str, Callable[[State], State]] = {
    "no scales": lambda state: {name: part for name, part in state.items() if name != "value_scales"},
    "fewer scales": changed("key_scales", lambda scales: scales[:, 1:]),
    "scales of another dtype": changed("key_scales", Tensor.half),
    "infinite scales": put("value_scales", 2, float("inf")),
    "numbers": lambda _state: used().state_dict(),
}


@pytest.mark.parametrize("fault", FAULTS_OF_CODES.values(), ids=FAULTS_OF_CODES.keys())
def test_a_state_of_codes_that_does_not_fit_is_refused_and_changes_nothing(fault: Callable[[State], State]) -> None:
    memory = used(dtype=torch.int8)
    before = memory.state_dict()
    with pytest.raises(ValueError, match=r"(?s)^expected .*got"):
        memory.load_state_dict(fault(before))
    assert_equal_states(memory.state_dict(), before)


def test_lists_of_memories_are_restored_all_or_none() -> None:
    memories, others = KNNMemoryList([used(), used(num_kv_heads=1)]), KNNMemoryList([make(), make(num_kv_heads=1)])
    state = memories.state_dict()
    assert {name.split(".")[0] for name in state} == {"0", "1"}
    for faulty in (
        {**state, "1.capacity": torch.zeros(2)},
        {**state, "2.capacity": torch.zeros(())},
        {name: part for name, part in state.items() if not name.startswith("1.")},
    ):
        with pytest.raises(ValueError, match=r"(?s)^expected .*got"):
            others.load_state_dict(faulty)
        assert [memory.num_entries for memory in others] == [(0,) * ROWS] * 2
    others.load_state_dict(state)
    assert_equal_states(others.state_dict(), state)


# Capacity


@pytest.mark.parametrize("capacity", [0, -3])
def test_a_capacity_below_one_is_refused(capacity: int) -> None:
    memories = KNNMemoryList([used(), used()])
    with pytest.raises(ValueError, match=r"^expected max_memories to be at least 1, got"):
        memories.resize(capacity)
    assert [memory.max_memories for memory in memories] == [CAPACITY] * 2


def test_lists_of_memories_are_resized_together() -> None:
    memories = KNNMemoryList([used(), used(num_kv_heads=1)])
    memories.resize(5)
    assert [(memory.max_memories, memory.num_entries) for memory in memories] == [(5, (5, 4, 0))] * 2


def test_a_resized_memory_has_new_files_in_the_same_place(tmp_path: Path) -> None:
    memory = used(directory=tmp_path)
    [before] = tmp_path.iterdir()
    memory.resize(100)
    [after] = tmp_path.iterdir()
    assert after != before
    assert (after / "origins").stat().st_size == ROWS * 100 * 3 * 8
    memory.cleanup()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "use",
    [KNNMemory.state_dict, lambda memory: memory.load_state_dict(used().state_dict()), lambda memory: memory.resize(3)],
    ids=["state_dict", "load_state_dict", "resize"],
)
def test_a_closed_memory_has_no_state(use: Callable[[KNNMemory], object]) -> None:
    memory = used()
    memory.cleanup()
    with pytest.raises(ValueError, match="closed by cleanup"):
        use(memory)


# Numbers that went wrong


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_an_error_of_their_own(number: float) -> None:
    memory = make()
    entries, queries = torch.zeros(ROWS, HEADS, 4, 2, DIM), torch.zeros(ROWS, HEADS, 4, DIM)
    entries[1, 1, 3, 1, 2] = queries[1, 1, 3, 2] = number
    for refused in (lambda: memory.add(entries), lambda: memory.stage(entries), lambda: memory.look_up(queries, 1)):
        with pytest.raises(NonFiniteError, match=r"^expected .* got NaN or infinity$"):
            refused()
    with pytest.raises(ValueError, match="expected entries") as error:
        memory.add(entries[1:])
    assert not isinstance(error.value, NonFiniteError)
