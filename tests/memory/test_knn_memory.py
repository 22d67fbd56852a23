"""What a memory promises: what remains, what is found, which rows change, what is refused, which files it makes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.checks import STORAGE_DTYPES, warn_once
from tests.reference import kept

DIM, CAPACITY, ROWS = 3, 5, 3

by_dtype = pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
by_kv_heads = pytest.mark.parametrize("kv_heads", [1, 3])


@pytest.fixture(params=["in RAM", "memory-mapped"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "memory-mapped" else None


@pytest.fixture
def memory() -> KNNMemory:
    return KNNMemory(DIM, CAPACITY, ROWS)


def numbered(*rows: Iterable[int]) -> Tensor:
    """An entry for each number, which fills its key and, negated, its value: (rows, n, 2, DIM)."""
    numbers = torch.tensor([list(row) for row in rows], dtype=torch.float32)
    return torch.stack((numbers, -numbers), dim=-1)[..., None].expand(-1, -1, -1, DIM)


def remembered(memory: KNNMemory) -> list[list[int]]:
    """The numbers that each row of the memory holds."""
    with memory.at_batch_indices(range(memory.num_indices)):
        pairs, mask = memory.search(torch.ones(memory.num_indices, memory.dim), memory.max_memories)
    assert torch.equal(pairs[..., 0, :], -pairs[..., 1, :])
    return [sorted(row[there, 0, 0].int().tolist()) for row, there in zip(pairs, mask, strict=True)]


# What remains


@pytest.mark.parametrize("sizes", [(12,), (3, 4, 5), (5, 5, 5), (1,) * 12, (4, 0, 1, 1), (2, 11), (6, 6)], ids=str)
def test_of_more_entries_than_capacity_the_last_remain(memory: KNNMemory, sizes: tuple[int, ...]) -> None:
    """Faults B3 and B4 of the original: at capacity everything was wiped, and values were those of other keys."""
    added = 0
    for size in sizes:
        memory.add(numbered(*[range(added, added + size)] * ROWS))
        added += size
        assert remembered(memory) == [list(range(max(added - CAPACITY, 0), added))] * ROWS


def test_rows_fill_independently(memory: KNNMemory) -> None:
    """Fault B5 of the original: adding to some rows moved the others."""
    for row, numbers in [(2, [1, 2, 3, 4]), (0, [5]), (2, [6, 7, 8]), (0, [9])]:
        with memory.at_batch_indices([row]):
            memory.add(numbered(numbers))
    assert remembered(memory) == [[5, 9], [], [3, 4, 6, 7, 8]]
    assert memory.num_entries == (2, 0, 5)


def test_a_slot_keeps_its_entry_until_it_is_overwritten() -> None:
    memory = KNNMemory(DIM, CAPACITY)
    memory.add(numbered(range(1, 6)))
    before = memory.retrieve(torch.ones(1, DIM), CAPACITY).slots[0].flip(0)  # of 1, 2, 3, 4, 5
    memory.add(numbered([6, 7]))
    after = memory.retrieve(torch.ones(1, DIM), CAPACITY).slots[0].flip(0)  # of 3, 4, 5, 6, 7
    assert torch.equal(after[:3], before[2:])
    assert set(after[3:].tolist()) == set(before[:2].tolist())


def test_masked_entries_are_not_stored(memory: KNNMemory) -> None:
    numbers = range(1, 10)
    mask = torch.tensor([[n % 2 == 0 for n in numbers], [n < 9 for n in numbers], [False] * 9])
    memory.add(numbered(numbers, numbers, numbers), mask)
    assert remembered(memory) == [[2, 4, 6, 8], [4, 5, 6, 7, 8], []]


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), 7e4])
def test_masked_entries_may_be_anything(padding: float) -> None:
    memory = KNNMemory(DIM, CAPACITY, dtype=torch.float16)
    entries = numbered([1, 2, 3]).clone()
    entries[:, 1] = padding
    memory.add(entries, torch.tensor([[True, False, True]]))
    assert remembered(memory) == [[1, 3]]


def test_later_changes_of_what_was_added_do_not_reach_the_memory() -> None:
    memory = KNNMemory(DIM, CAPACITY)
    entries = numbered([1, 2, 3]).clone()
    memory.add(entries)
    entries.zero_()
    assert remembered(memory) == [[1, 2, 3]]


@by_kv_heads
def test_every_entry_keeps_its_origin(kv_heads: int, directory: Path | None) -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS, num_kv_heads=kv_heads, directory=directory)
    origins = torch.arange(ROWS * 7 * 3).view(ROWS, 7, 3) + 2**40
    entries = numbered(*[range(7)] * ROWS)[:, None].expand(-1, kv_heads, -1, -1, -1)
    memory.add(entries[:, :, :4], origins=origins[:, :4])
    memory.add(entries[:, :, 4:], origins=origins[:, 4:])
    retrieved = memory.retrieve(torch.ones(ROWS, kv_heads, DIM), CAPACITY)  # 6, 5, 4, 3, 2
    assert torch.equal(memory.origins(retrieved.slots), origins[:, 2:].flip(1)[:, None].expand(-1, kv_heads, -1, -1))


def test_masked_entries_leave_no_origin(memory: KNNMemory) -> None:
    origins = torch.arange(4)[None, :, None].expand(ROWS, 4, 3)
    memory.add(numbered(*[range(4)] * ROWS), torch.tensor([[True, False, True, False]] * ROWS), origins)
    slots = memory.retrieve(torch.ones(ROWS, DIM), 2).slots
    assert memory.origins(slots)[..., 1].tolist() == [[2, 0]] * ROWS


def test_origins_are_unknown_unless_given() -> None:
    memory = KNNMemory(DIM, max_memories=1)
    memory.add(numbered([1]), origins=torch.tensor([[[7, 8, 9]]]))
    memory.add(numbered([2]))
    assert memory.origins(torch.tensor([[0]])).tolist() == [[[-1, -1, -1]]]


@pytest.mark.parametrize(
    ("cleared", "left"),
    [
        (None, [[], [], []]),
        (1, [[1], [], [3]]),
        ([1], [[1], [], [3]]),
        ((0, 2), [[], [2], []]),
        (torch.tensor([2, 0]), [[], [2], []]),
        ([], [[1], [2], [3]]),
    ],
    ids=str,
)
def test_clear_empties_the_rows_it_names(memory: KNNMemory, cleared: Any, left: list[list[int]]) -> None:
    memory.add(numbered([1], [2], [3]))
    memory.clear(cleared)
    assert remembered(memory) == left


def test_a_cleared_row_fills_like_a_fresh_one(memory: KNNMemory) -> None:
    memory.add(numbered(*[range(7)] * ROWS))
    memory.clear(1)
    for number in range(10, 17):
        memory.add(numbered(*[[number]] * ROWS))
        assert remembered(memory)[1] == list(range(10, number + 1))[-CAPACITY:]


def test_a_memory_made_in_inference_mode_can_be_written_outside_it(directory: Path | None) -> None:
    with torch.inference_mode():
        memory = KNNMemory(DIM, CAPACITY, directory=directory)
        memory.add(numbered([1, 2]))
    memory.add(numbered([3]))
    assert remembered(memory) == [[1, 2, 3]]


# What a search finds


def brute_force(queries: Tensor, entries: Tensor, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """queries (R, H, T, D), entries (R, G, N, 2, D) -> scores (R, H, T, K) and key_values (R, H, T, K, 2, D)."""
    stored = entries.double().numpy().repeat(queries.shape[1] // entries.shape[1], axis=1)
    scores = np.einsum("rhtd,rhnd->rhtn", queries.double().numpy(), stored[..., 0, :])
    best = np.argsort(-scores)[..., :topk]
    key_values = np.take_along_axis(stored[:, :, None], best[..., None, None], axis=3)
    return np.take_along_axis(scores, best, axis=3), key_values


@by_dtype
@by_kv_heads
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_search_is_exact(dtype: torch.dtype, kv_heads: int, directory: Path | None, query_dtype: torch.dtype) -> None:
    """Faults B4 and B8 of the original: 16-bit numbers failed, and at capacity other entries came back."""
    memory = KNNMemory(7, 23, ROWS, num_kv_heads=kv_heads, dtype=dtype, directory=directory)
    entries = torch.randn(ROWS, kv_heads, 37, 2, 7)
    memory.add(entries[:, :, :19])
    memory.add(entries[:, :, 19:])
    queries = torch.randn(ROWS, 2 * kv_heads, 11, 7).to(query_dtype)
    scores, key_values = brute_force(queries, kept(entries[:, :, -23:], dtype), topk=5)

    retrieved = memory.retrieve(queries, topk=5)
    tolerance = 1e-12 if query_dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(retrieved.scores.double().numpy(), scores, rtol=tolerance, atol=tolerance)
    assert retrieved.scores.dtype == (torch.float64 if query_dtype == torch.float64 else torch.float32)
    found, mask = memory.search(queries, topk=5)
    np.testing.assert_array_equal(found.double().numpy(), key_values)
    assert found.dtype == (torch.float32 if dtype == torch.int8 else dtype)
    assert mask.all()
    assert retrieved.mask.all()


def test_each_query_head_reads_its_own_kv_head() -> None:
    memory = KNNMemory(DIM, CAPACITY, num_kv_heads=3)
    entries = torch.tensor([10.0, 20.0, 30.0])[None, :, None, None, None].expand(1, 3, 4, 2, DIM)
    memory.add(entries)
    key_values, _ = memory.search(torch.ones(1, 6, DIM), topk=1)
    assert key_values[0, :, 0, 0, 0].tolist() == [10, 10, 20, 20, 30, 30]


def test_slots_name_the_entries_in_the_store() -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS, num_kv_heads=3)
    memory.add(torch.randn(ROWS, 3, 4, 2, DIM))
    queries = torch.randn(ROWS, 6, 7, DIM)
    slots = memory.retrieve(queries, topk=3).slots
    key_values, _ = memory.search(queries, topk=3)
    assert torch.equal(memory.store.keys.flatten(0, 2)[slots].floats(), key_values[..., 0, :])
    assert torch.equal(memory.store.values.flatten(0, 2)[slots].floats(), key_values[..., 1, :])


@pytest.mark.parametrize("topk", [2, 5, 9])
def test_where_fewer_entries_exist_the_rest_is_masked_and_zero(memory: KNNMemory, topk: int) -> None:
    memory.add(numbered(*[range(1, 6)] * ROWS))
    memory.clear()
    with memory.at_batch_indices([2, 0]):
        memory.add(numbered([3], [1]))
        memory.add(numbered([4, 5], [2, 6]), mask=torch.tensor([[True, True], [False, False]]))
    queries = torch.ones(ROWS, 7, DIM)
    slots, scores, mask = memory.retrieve(queries, topk)
    key_values, search_mask = memory.search(queries, topk)
    assert torch.equal(mask, search_mask)
    assert mask.sum(-1)[:, 0].tolist() == [1, 0, min(topk, 3)]
    assert bool((mask.int().diff(dim=-1) <= 0).all()), "the entries found come first"
    assert bool((scores[mask] > 0).all())
    for padded in (slots, scores, key_values):
        assert not bool(padded[~mask].any())


@pytest.mark.parametrize(
    ("kv_heads", "shape"),
    [(1, ()), (1, (7,)), (1, (4, 7)), (1, (4, 1, 2)), (1, (0,)), (3, (3,)), (3, (6, 5)), (3, (3, 2, 1)), (3, (3, 0))],
)
def test_results_have_the_shape_of_the_queries(kv_heads: int, shape: tuple[int, ...]) -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS, num_kv_heads=kv_heads)
    memory.add(torch.randn(ROWS, kv_heads, 4, 2, DIM))
    queries = torch.randn(ROWS, *shape, DIM)
    assert all(part.shape == (ROWS, *shape, 2) for part in memory.retrieve(queries, topk=2))
    key_values, mask = memory.search(queries, topk=2)
    assert key_values.shape == (ROWS, *shape, 2, 2, DIM)
    assert mask.shape == (ROWS, *shape, 2)


def test_neither_adding_nor_searching_is_part_of_a_graph(memory: KNNMemory) -> None:
    memory.add(torch.randn(ROWS, 4, 2, DIM, requires_grad=True))
    queries = torch.randn(ROWS, DIM, requires_grad=True)
    results = (*memory.retrieve(queries, topk=2), *memory.search(queries, topk=2), memory.store.keys.numbers)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """Fault B8 of the original: it failed under autocast."""
    entries, queries = torch.randn(ROWS, 4, 2, DIM), torch.randn(ROWS, 7, DIM)
    plain, cast = KNNMemory(DIM, CAPACITY, ROWS), KNNMemory(DIM, CAPACITY, ROWS)
    plain.add(entries)
    with torch.autocast("cpu", dtype):
        cast.add(entries)
        found, _ = cast.search(queries, topk=3)
    assert torch.equal(found, plain.search(queries, topk=3)[0])


@pytest.mark.parametrize("query", [1e30, -1e30])
def test_what_is_found_lies_in_the_row_even_if_its_score_overflows(query: float) -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS)
    memory.add(torch.full((ROWS, 4, 2, DIM), 1e30))
    slots = memory.retrieve(torch.full((ROWS, DIM), query), topk=3).slots
    assert (slots // CAPACITY).tolist() == [[row] * 3 for row in range(ROWS)]


# Scopes


def test_batches_consist_of_the_rows_in_scope_in_their_order(memory: KNNMemory) -> None:
    with memory.at_batch_indices(row for row in (2, 0)) as scoped:
        assert scoped is memory
        memory.add(numbered([1, 2], [3, 4]))
        key_values, _ = memory.search(torch.ones(2, DIM), topk=1)
    assert remembered(memory) == [[3, 4], [], [1, 2]]
    assert key_values[:, 0, 0, 0].tolist() == [2, 4]


def test_an_inner_scope_replaces_the_outer_one(memory: KNNMemory) -> None:
    with memory.at_batch_indices([0, 1]):
        with memory.at_batch_indices([2]):
            memory.add(numbered([1]))
        memory.add(numbered([2], [3]))
    memory.add(numbered([4], [5], [6]))
    assert remembered(memory) == [[2, 4], [3, 5], [1, 6]]


def test_the_scope_is_restored_after_an_exception(memory: KNNMemory) -> None:
    """Fault B6 of the original: it was not."""
    with memory.at_batch_indices([0, 1]):
        with pytest.raises(ZeroDivisionError), memory.at_batch_indices([2]):
            raise ZeroDivisionError
        assert memory.scoped_indices == [0, 1]
    assert memory.scoped_indices == [0, 1, 2]


def test_clear_without_rows_empties_the_scope_only(memory: KNNMemory) -> None:
    memory.add(numbered([1], [2], [3]))
    with memory.at_batch_indices([0, 2]):
        memory.clear()
    assert remembered(memory) == [[], [2], []]


def test_entries_staged_in_a_scope_are_stored_there(memory: KNNMemory) -> None:
    with memory.at_batch_indices([2, 0]):
        staged = memory.stage(numbered([1], [2]))
    memory.commit(staged)
    assert remembered(memory) == [[2], [], [1]]


# Bad input


def state_of(memory: KNNMemory) -> list[Any]:
    """All that a caller can see of a memory, and where it lies."""
    store = memory.store
    tensors = [part.tolist() for part in store.tables.values()]
    return [tensors, memory.num_entries, memory.scoped_indices, remembered(memory)]


def entries_with(number: float) -> Tensor:
    entries = torch.randn(ROWS, 4, 2, DIM)
    entries[1, 2, 1, 0] = number
    return entries


GOOD = torch.zeros(ROWS, 4, 2, DIM)
BAD_CALLS: dict[str, Callable[[KNNMemory], object]] = {
    "too few rows": lambda memory: memory.add(GOOD[1:]),
    "no pairs": lambda memory: memory.add(torch.zeros(ROWS, 4, DIM)),
    "triples": lambda memory: memory.add(torch.zeros(ROWS, 4, 3, DIM)),
    "wider entries": lambda memory: memory.add(torch.zeros(ROWS, 4, 2, DIM + 1)),
    "other kv heads": lambda memory: memory.add(torch.zeros(ROWS, 2, 4, 2, DIM)),
    "NaN": lambda memory: memory.add(entries_with(float("nan"))),
    "infinity": lambda memory: memory.add(entries_with(float("-inf"))),
    "overflow": lambda memory: memory.add(entries_with(7e4)),
    "integer entries": lambda memory: memory.add(GOOD.long()),
    "mask of numbers": lambda memory: memory.add(GOOD, torch.ones(ROWS, 4)),
    "longer mask": lambda memory: memory.add(GOOD, torch.ones(ROWS, 5, dtype=torch.bool)),
    "mask with fewer rows": lambda memory: memory.add(GOOD, torch.ones(1, 4, dtype=torch.bool)),
    "origins of floats": lambda memory: memory.add(GOOD, origins=torch.zeros(ROWS, 4, 3)),
    "origins of pairs": lambda memory: memory.add(GOOD, origins=torch.zeros(ROWS, 4, 2, dtype=torch.int64)),
    "more origins": lambda memory: memory.add(GOOD, origins=torch.zeros(ROWS, 5, 3, dtype=torch.int64)),
    "queries of fewer rows": lambda memory: memory.search(torch.zeros(2, 7, DIM), 1),
    "narrower queries": lambda memory: memory.search(torch.zeros(ROWS, 7, DIM - 1), 1),
    "one number": lambda memory: memory.retrieve(torch.zeros(()), 1),
    "integer queries": lambda memory: memory.retrieve(torch.zeros(ROWS, DIM, dtype=torch.int64), 1),
    "NaN queries": lambda memory: memory.retrieve(torch.full((ROWS, DIM), float("nan")), 1),
    "infinite queries": lambda memory: memory.search(torch.full((ROWS, DIM), float("inf")), 1),
    "topk of 0": lambda memory: memory.retrieve(torch.zeros(ROWS, DIM), 0),
    "negative slot": lambda memory: memory.origins(torch.tensor([0, -1])),
    "slot too large": lambda memory: memory.origins(torch.tensor([ROWS * CAPACITY, 0])),
    "scope out of range": lambda memory: memory.at_batch_indices([0, ROWS]).__enter__(),
    "negative row": lambda memory: memory.at_batch_indices([-1]).__enter__(),
    "repeated row": lambda memory: memory.at_batch_indices([1, 0, 1]).__enter__(),
    "empty scope": lambda memory: memory.at_batch_indices([]).__enter__(),
    "clear out of range": lambda memory: memory.clear([0, ROWS]),
    "clear a negative row": lambda memory: memory.clear(-1),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_input_is_refused_and_changes_nothing(call: Callable[[KNNMemory], object]) -> None:
    memory = KNNMemory(DIM, CAPACITY, ROWS, dtype=torch.float16)
    memory.add(numbered([1, 2], [3, 4], [5, 6]))
    before = state_of(memory)
    with pytest.raises(ValueError, match=r"expected .*, got "):
        call(memory)
    assert state_of(memory) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda memory: memory.add(torch.zeros(ROWS, 4, 2, DIM)),
        lambda memory: memory.add(torch.zeros(ROWS, 1, 4, 2, DIM)),
        lambda memory: memory.search(torch.zeros(ROWS, DIM), 1),
        lambda memory: memory.search(torch.zeros(ROWS, 4, 7, DIM), 1),
    ],
    ids=[
        "entries without heads",
        "entries of one head",
        "queries without heads",
        "4 query heads for 3 key/value heads",
    ],
)
def test_heads_that_do_not_fit_are_refused(call: Callable[[KNNMemory], object]) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got "):
        call(KNNMemory(DIM, CAPACITY, ROWS, num_kv_heads=3))


def test_clearing_a_row_outside_the_scope_is_refused(memory: KNNMemory) -> None:
    memory.add(numbered([1], [2], [3]))
    with memory.at_batch_indices([0, 2]), pytest.raises(ValueError, match=r"expected rows of the scope \[0, 2\], got"):
        memory.clear([0, 1])
    assert remembered(memory) == [[1], [2], [3]]


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0},
        {"max_memories": 0},
        {"num_indices": -1},
        {"num_kv_heads": 0},
        {"dtype": torch.float64},
        {"dtype": torch.int32},
        {"index": "approximate"},
        {"device": "cuda"},
        {"device": torch.device("meta")},
    ],
    ids=str,
)
def test_bad_options_are_refused_and_leave_no_files(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got "):
        KNNMemory(**{"dim": DIM, "directory": tmp_path, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "use",
    [
        lambda memory: memory.add(numbered([1], [2], [3])),
        lambda memory: memory.retrieve(torch.zeros(ROWS, DIM), 1),
        lambda memory: memory.search(torch.zeros(ROWS, DIM), 1),
        lambda memory: memory.look_up(torch.zeros(ROWS, 1, 1, DIM), 1),
        lambda memory: memory.origins(torch.tensor([0])),
        lambda memory: memory.clear(),
        lambda memory: memory.num_entries,
    ],
    ids=["add", "retrieve", "search", "look_up", "origins", "clear", "num_entries"],
)
def test_a_closed_memory_refuses_use(memory: KNNMemory, use: Callable[[KNNMemory], object]) -> None:
    memory.cleanup()
    with pytest.raises(ValueError, match="closed by cleanup"):
        use(memory)
    assert "closed" in repr(memory)


# Files


def test_a_memory_in_ram_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault B13 of the original: it left a file in the working directory."""
    monkeypatch.chdir(tmp_path)
    memory = KNNMemory(DIM, CAPACITY)
    memory.add(numbered([1, 2]))
    assert list(tmp_path.iterdir()) == []


def test_a_memory_mapped_memory_lies_in_its_directory(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "when missing"
    memory = KNNMemory(DIM, CAPACITY, directory=directory)
    memory.add(numbered([1, 2]))
    files = {path.name: np.fromfile(path, np.float32) for path in directory.rglob("*s") if path.is_file()}
    np.testing.assert_array_equal(files["keys"], memory.store.keys.numbers.flatten())
    np.testing.assert_array_equal(files["values"], memory.store.values.numbers.flatten())


def test_memories_in_one_directory_never_clash(tmp_path: Path) -> None:
    """Fault B11 of the original: a second memory zeroed the first."""
    first = KNNMemory(DIM, CAPACITY, directory=tmp_path)
    first.add(numbered([1, 2]))
    second = KNNMemory(DIM, CAPACITY, directory=tmp_path)
    second.add(numbered([3]))
    assert (remembered(first), remembered(second)) == ([[1, 2]], [[3]])
    first.cleanup()
    assert remembered(second) == [[3]]


def test_cleanup_removes_the_files_and_only_those(tmp_path: Path) -> None:
    (tmp_path / "of somebody else").touch()
    memory = KNNMemory(DIM, CAPACITY, directory=tmp_path)
    memory.cleanup()
    memory.cleanup()
    assert [path.name for path in tmp_path.iterdir()] == ["of somebody else"]


def test_garbage_collection_removes_the_files(tmp_path: Path) -> None:
    memory = KNNMemory(DIM, CAPACITY, directory=tmp_path)
    memory.add(numbered([1]))
    assert list(tmp_path.iterdir()) != []
    del memory
    gc.collect()
    assert list(tmp_path.iterdir()) == []


# Arguments of the original


@pytest.fixture
def _nothing_warned_yet() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@pytest.mark.usefixtures("_nothing_warned_yet")
@pytest.mark.parametrize("options", [{"multiprocessing": True}, {"multiprocessing": False}], ids=str)
def test_multiprocessing_is_accepted_with_one_warning(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="multiprocessing has no effect") as warned:
        KNNMemory(DIM, CAPACITY, **options)
    assert [Path(warning.filename) for warning in warned] == [Path(__file__)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KNNMemory(DIM, CAPACITY, **options)


@pytest.mark.usefixtures("_nothing_warned_yet")
def test_memmap_filename_chooses_the_directory_with_one_warning(tmp_path: Path) -> None:
    filename = tmp_path / "knn.memory.memmap"
    with pytest.warns(UserWarning, match="memmap_filename") as warned:
        memories = [KNNMemory(DIM, CAPACITY, memmap_filename=str(filename)) for _ in range(2)]
    assert len(warned) == 1
    assert len(list(tmp_path.iterdir())) == 2
    assert not filename.exists()
    for memory in memories:
        memory.cleanup()


@pytest.mark.parametrize("mask", [torch.tensor([False, True, False]), [False, True, False]], ids=["tensor", "list"])
def test_a_mask_of_rows_is_not_taken_for_row_numbers(memory: KNNMemory, mask: Any) -> None:
    before = memory.num_entries
    with pytest.raises(ValueError, match=r"expected rows as integers, got \[False, True, False\]"):
        memory.clear(mask)
    with pytest.raises(ValueError, match="expected rows as integers"), memory.at_batch_indices(mask):
        pass
    assert memory.num_entries == before
