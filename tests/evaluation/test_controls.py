"""Useless memories: what they change, and that they change nothing for good."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from memorizing_transformers_pytorch import KNNMemory
from memorizing_transformers_pytorch.evaluation.controls import (
    CONTROLS,
    control,
    other_rows,
    random_keys,
    shuffled_values,
)
from memorizing_transformers_pytorch.memory import KNNMemoryList


def make_memory(dtype: torch.dtype = torch.float32) -> KNNMemory:
    """Two heads; one row whose ring has turned, one half full, one empty."""
    memory = KNNMemory(dim=5, max_memories=9, num_indices=3, num_kv_heads=2, dtype=dtype)
    with memory.at_batch_indices([0]):
        memory.add(torch.randn(1, 2, 13, 2, 5))
    with memory.at_batch_indices([1]):
        memory.add(torch.randn(1, 2, 4, 2, 5))
    return memory


def contents(memory: KNNMemory) -> list[torch.Tensor]:
    """Keys, values and origins of each row, the oldest first, then 0."""
    rows = [memory.store.oldest(row, memory.max_memories) for row in range(memory.num_indices)]
    parts = zip(*((each.keys.floats(), each.values.floats(), each.origins) for each in rows), strict=True)
    return [torch.cat([pad(row, (0, 0, 0, memory.max_memories - row.shape[-2])) for row in part]) for part in parts]


@pytest.mark.parametrize("name", [None, *CONTROLS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_memories_are_put_back_bit_for_bit_also_after_an_exception(name: str | None, dtype: torch.dtype) -> None:
    memories = KNNMemoryList([make_memory(dtype), make_memory(dtype)])
    before = [{key: table.clone() for key, table in memory.store.tables.items()} for memory in memories]
    ordered = [contents(memory) for memory in memories]

    def look_and_fail() -> None:
        for memory, kept in zip(memories, ordered, strict=True):
            changed = [not torch.equal(a, b) for a, b in zip(contents(memory), kept, strict=True)]
            assert changed == [name == "random keys", name == "shuffled", False]
            assert memory.scoped_indices == ([1, 2, 0] if name == "other" else [0, 1, 2])
        raise KeyError

    with pytest.raises(KeyError), control(name, memories, torch.Generator().manual_seed(0)):
        look_and_fail()
    for memory, tables in zip(memories, before, strict=True):
        assert all(torch.equal(table, tables[key]) for key, table in memory.store.tables.items())
        assert memory.scoped_indices == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_shuffled_values_are_the_same_values_of_the_same_row_at_other_keys(dtype: torch.dtype) -> None:
    memory = make_memory(dtype)
    keys, values, _ = contents(memory)
    with shuffled_values(memory, torch.Generator().manual_seed(0)):
        assert torch.equal(contents(memory)[0], keys)
        for row, filled in enumerate((9, 4, 0)):
            inside, before = contents(memory)[1][row, :, :filled], values[row, :, :filled]
            assert filled == 0 or not torch.equal(inside, before)
            torch.testing.assert_close(inside.sort(dim=1).values, before.sort(dim=1).values, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_random_keys_have_the_lengths_of_the_right_ones_and_their_values(dtype: torch.dtype) -> None:
    memory = make_memory(dtype)
    keys, values, _ = contents(memory)
    with random_keys(memory, torch.Generator().manual_seed(0)):
        assert torch.equal(contents(memory)[1], values)
        random = contents(memory)[0]
        tolerance = 0.02 if dtype == torch.int8 else 1e-6
        torch.testing.assert_close(random.norm(dim=-1), keys.norm(dim=-1), rtol=tolerance, atol=1e-6)
        cosines = torch.cosine_similarity(random[0], keys[0], dim=-1)
        assert cosines.abs().max() < 0.99


def test_an_approximate_index_knows_nothing_of_what_a_control_has_changed() -> None:
    memory = KNNMemory(dim=5, max_memories=2_000, index="IVF4,Flat")
    keys = torch.nn.functional.normalize(torch.randn(1, 2_000, 5), dim=-1)
    memory.add(torch.stack((keys, keys), dim=-2))
    queries = keys[:, :300]
    before = memory.retrieve(queries, 4)
    with random_keys(memory, torch.Generator().manual_seed(0)):
        best = (queries @ memory.store.keys[0].floats().mT).topk(4, dim=-1)
        torch.testing.assert_close(memory.retrieve(queries, 4).scores, best.values)
        memory.clear([])
    after = memory.retrieve(queries, 4)
    assert memory.index_in_use.startswith("IVF4,Flat, nprobe")
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("change", [shuffled_values, random_keys])
def test_only_rows_in_scope_are_changed(change: object) -> None:
    memory = make_memory()
    before = contents(memory)
    with memory.at_batch_indices([1]), change(memory, torch.Generator().manual_seed(0)):  # type: ignore[operator]
        inside = contents(memory)
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(inside, before, strict=True))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(inside, before, strict=True))


@pytest.mark.parametrize(("rows", "expected"), [([0, 1, 2], [1, 2, 0]), ([0, 1], [1, 0]), ([0], [1]), ([2], [0])])
def test_no_row_reads_its_own_memory_as_that_of_another(rows: list[int], expected: list[int]) -> None:
    assert other_rows(rows, num_rows=3) == expected


def test_a_single_document_has_no_other() -> None:
    with pytest.raises(ValueError, match="expected at least 2 documents for the memory of another one, got 1"):
        other_rows([0], num_rows=1)


@pytest.mark.parametrize("change", [shuffled_values, random_keys])
def test_a_look_up_keeps_what_it_found(change: object) -> None:
    memory = make_memory()
    lookup = memory.look_up(torch.randn(3, 2, 5, requires_grad=True), topk=2)
    before = lookup.tables()[0]
    with change(memory, torch.Generator()):  # type: ignore[operator]
        inside = lookup.tables()[0]
    for table in (inside, lookup.tables()[0]):
        assert torch.equal(table.keys.numbers, before.keys.numbers)
        assert torch.equal(table.values.numbers, before.values.numbers)
