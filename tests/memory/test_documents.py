"""What a memory holds of each document; memories out of memories."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing_transformers_pytorch import KNNMemory, KNNMemoryList
from memorizing_transformers_pytorch.memory.disk.manifest import NAME
from memorizing_transformers_pytorch.memory.ledger import Ledger
from memorizing_transformers_pytorch.memory.search import Hidden
from tests.memory.test_disk import add, contents, memories, read, same


def library() -> KNNMemoryList:
    """Two memories of two rows, which hold three documents."""
    made = memories()
    for title, count in (("one", 5), ("two", 7), ("<b>", 2)):
        read(made, title, count)
    return made


def test_documents_are_listed_with_what_is_held_of_each() -> None:
    made = library()
    table = made.documents()
    assert [(each.number, each.title, each.tokens) for each in table] == [(0, "one", 5), (1, "two", 7), (2, "<b>", 2)]
    assert [each.entries for each in table] == [(10, 10), (14, 14), (4, 4)]  # of both rows
    assert sum(each.bytes for each in table) == 2 * 28 * made[0].store.sizes.bytes_per_entry
    assert all(each.added.endswith("+00:00") for each in table)
    assert str(table).split()[:4] == ["number", "title", "row", "tokens"]
    assert "<b>" not in table._repr_html_()
    assert list(pytest.importorskip("pandas").DataFrame(table.to_dicts()).title) == ["one", "two", "<b>"]
    assert list(table.to_pandas().tokens) == [5, 7, 2]


def test_entries_that_no_ledger_knows_are_listed_by_their_numbers() -> None:
    made = KNNMemoryList([KNNMemory(4, 10)])
    made.add([torch.randn(1, 3, 2, 4)], origins=torch.tensor([[[7, 0, 1], [7, 1, 1], [-1, -1, -1]]]))
    assert [(each.number, each.title, each.tokens) for each in made.documents()] == [(7, "document 7", 2)]


def test_origins_can_be_walked_through_in_their_order() -> None:
    made = library()
    assert [(each.document, each.position) for each in made.entries(1, layer=1)][4:7] == [(0, 4), (1, 0), (1, 1)]
    with pytest.raises(ValueError, match="expected a memory from 0 to 1, got 2"):
        made.entries(0, layer=2)
    with pytest.raises(ValueError, match="expected distinct rows from 0 to 1"):
        made.entries(2)


def test_documents_are_forgotten_by_number_title_or_condition() -> None:
    made = library()
    assert made.forget("two") == 28
    assert made.forget([0]) == 20
    assert made.forget(where=lambda each: each.title.startswith("<")) == 8
    assert made.documents() == []
    assert [each.num_entries for each in made] == [(0, 0), (0, 0)]
    assert made.ledger.begin("four", 0, 0) == 3  # numbers are not given twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected a document or where=, got both or none"),
        ({"document": 0, "where": bool}, "expected a document or where=, got both or none"),
        ({"document": "four"}, "no document is titled 'four'"),
        ({"document": [0, 9, 10**30]}, f"the memory has no document 9, {10**30}"),
        ({"document": 1.7}, "documents are chosen by number or title, got 1.7"),
        ({"document": [0, True]}, "documents are chosen by number or title, got True"),
    ],
)
def test_what_cannot_be_forgotten_is_refused_and_nothing_is_lost(arguments: dict, message: str) -> None:
    made = library()
    before = picture(made)
    with pytest.raises(ValueError, match=message):
        made.forget(**arguments)
    assert picture(made) == before


def picture(of: KNNMemoryList) -> Any:
    """All that a list of memories says of itself."""
    entries = [{name: part.tolist() for name, part in row.items()} for row in contents(of)]
    ledger = [vars(each) for each in of.ledger.documents()], of.ledger.next_number, of.ledger.latest(0)
    return entries, ledger, of.fingerprint, dict(of.extra), of.marks, repr(of), [list(each.store.lives) for each in of]


def test_parts_and_copies_hold_what_they_should_and_share_nothing() -> None:
    made = library()
    part, copy = made.only(["two", 2]), made.to("cpu")
    assert [each.title for each in part.documents()] == ["two", "<b>"]
    assert [each.document for each in part.entries(0)] == [1] * 7 + [2] * 2
    assert same(made, copy)
    with pytest.raises(ValueError, match="the memory has no document 9"):
        made.only([1, 9])
    read(copy, "four", 3)
    assert [each.title for each in made.documents()] == ["one", "two", "<b>"]


def test_a_row_can_be_copied_over_another() -> None:
    made = memories()
    with made.at_batch_indices([0]):
        made.add([torch.randn(1, 2, 4, 2, 8) for _ in made])
    made.copy_row(0, 1)
    first, second = contents(made)[:2]
    assert torch.equal(first["keys"], second["keys"])
    assert made[0].num_entries == (4, 4)
    with pytest.raises(ValueError, match="expected distinct rows from 0 to 1"):
        made.copy_row(0, 2)


def test_merged_memories_hold_both_and_other_kinds_are_refused() -> None:
    one, other = library(), library()
    one.merge(other)
    assert [each.title for each in one.documents()] == ["one", "two", "<b>"] * 2
    assert [each.number for each in one.documents()] == list(range(6))
    other.fingerprint, one.fingerprint = "these", "those"
    before = picture(one), picture(other)
    for wrong in (memories(rows=1), memories(dtype=torch.bfloat16), KNNMemoryList()):
        with pytest.raises(ValueError, match="expected memories with rows, key/value heads, width and dtype"):
            one.merge(wrong)
    with pytest.raises(ValueError, match="expected a memory written by weights"):
        one.merge(other)
    assert (picture(one), picture(other)) == before


def test_what_was_loaded_from_the_same_state_is_not_merged_twice(tmp_path: Path) -> None:
    saved, folder = library(), tmp_path / "memory"
    saved.save(folder)
    shutil.copytree(folder, tmp_path / "copy")
    one, other, copy = (KNNMemoryList.load(path) for path in (folder, folder, tmp_path / "copy"))
    read(other, "later", 3)
    before = picture(one), picture(saved)
    for own, again in ((one, other), (one, copy), (saved, one)):
        with pytest.raises(ValueError, match="hold documents of the same saved state"):
            own.merge(again)
    assert (picture(one), picture(saved)) == before
    one.forget(["one", "<b>"])
    copy.forget("two")
    one.merge(copy)
    assert sorted(each.title for each in one.documents()) == ["<b>", "one", "two"]


def test_a_document_is_forgotten_in_all_rows_whatever_the_scope() -> None:
    made = library()
    with made.at_batch_indices([0]):
        made.forget("two")
    assert [each.num_entries for each in made] == [(7, 7), (7, 7)]


def test_what_was_merged_keeps_fingerprints_and_gives_no_number_twice() -> None:
    one, other = KNNMemoryList([KNNMemory(4, 10)]), KNNMemoryList([KNNMemory(4, 10)])
    other.add([torch.randn(1, 2, 2, 4)], origins=torch.tensor([[[7, 0, 1], [7, 1, 1]]]))
    other.fingerprint = "theirs"
    one.merge(other)
    assert one.fingerprint == "theirs"
    assert one.ledger.begin("new", 0, 0) > max(each.number for each in one.documents() if each.tokens == 2)
    with pytest.raises(ValueError, match=r"expected another memory, .*got itself"):
        one.merge(one)
    other.extra = {"arranged": []}
    with pytest.raises(ValueError, match=r"AttachedMemory\.merge"):
        one.merge(other)


@pytest.mark.parametrize("through", ["nothing", "disk", "only", "to", "merge"])
def test_what_comes_after_a_forgotten_last_document_is_a_new_one(through: str, tmp_path: Path) -> None:
    made = library()
    made.forget("<b>")
    if through == "disk":
        made.save(tmp_path / "memory")
        made = KNNMemoryList.load(tmp_path / "memory")
        assert b"<b>" not in (tmp_path / "memory" / NAME).read_bytes()
    elif through == "merge":
        empty = memories()
        empty.merge(made)
        made = empty
    elif through != "nothing":
        made = made.only(["one", "two"]) if through == "only" else made.to("cpu")
    assert [each.title for each in made.documents()] == ["one", "two"]
    assert made.ledger.latest(0) is None
    assert made.ledger.latest(0) != made.ledger.begin("next", 0, 0) == made.ledger.latest(0)


def test_the_last_document_is_continued_where_another_one_was_forgotten(tmp_path: Path) -> None:
    made = library()
    made.forget("two")
    made.save(tmp_path / "memory")
    assert KNNMemoryList.load(tmp_path / "memory").ledger.latest(0) == made.ledger.latest(0) == 2


def test_a_document_of_which_nothing_was_read_leaves_no_trace() -> None:
    made = library()
    made.ledger.grow(made.ledger.begin("nothing", 0, 0), 0)
    assert made.ledger.latest(0) == 2
    made.ledger.grow(77, 5)
    assert len(made.documents()) == 3


def test_a_cleared_row_lists_no_documents_until_entries_of_them_are_stored() -> None:
    made = memories(rows=2)
    numbers = [made.ledger.begin(title, row, 0) for row, title in enumerate(("left", "right"))]
    for number in numbers:
        made.ledger.grow(number, 4)
    pairs = [torch.randn(2, 2, 4, 2, 8) for _ in made]
    origins = torch.tensor(numbers)[:, None, None].expand(2, 4, 3)
    made.add(pairs, origins=origins)
    made.clear_memory([1], memory_indices=[0])  # the other layer remembers it
    assert len(made.documents()) == 2
    made.clear_memory([1], memory_indices=[0, 1])
    assert [each.title for each in made.documents()] == ["left"]
    assert made.ledger.latest(1) is None
    made.add(pairs, torch.tensor([[False], [True]]).expand(2, 4), origins)
    assert [each.title for each in made.documents()] == ["left", "right"]
    made.clear_memory()
    assert (list(made.documents()), bool(made.ledger)) == ([], False)
    later = made.ledger.begin("later", 1, 0)
    made.ledger.grow(later, 4)
    made.add(pairs, torch.tensor([[False], [True]]).expand(2, 4), torch.full((2, 4, 3), later))
    assert (made.ledger.latest(1), [each.title for each in made.documents()]) == (later, ["later"])
    assert numbers[1] not in made.ledger


@pytest.mark.parametrize(
    "call",
    [
        lambda made: made.clear_memory([0, 5]),
        lambda made: made.clear_memory(memory_indices=[0, 7]),
        lambda made: made.copy_row(0, 2),
        lambda made: made.add([torch.zeros(2, 2, 1, 2, 8), torch.zeros(2, 2, 1, 2, 9)]),
        lambda made: made.add([torch.zeros(2, 2, 1, 2, 8)]),
        lambda made: made.add([torch.zeros(2, 2, 1, 2, 8), torch.full((2, 2, 1, 2, 8), torch.nan)]),
        lambda made: made.resize(0),
        lambda made: made.load_state_dict({**made.state_dict(), "1.keys": torch.zeros(1)}),
        lambda made: made.forget(where=lambda each: 1 // 0),
        lambda made: made.merge(made),
    ],
)
def test_a_refused_call_changes_nothing(call: Callable[[KNNMemoryList], object]) -> None:
    made = library()
    before = picture(made)
    with pytest.raises((ValueError, ZeroDivisionError)):
        call(made)
    assert picture(made) == before


@pytest.mark.parametrize("topk", [3, 20])
def test_hidden_entries_are_as_if_they_were_not_there(topk: int) -> None:
    (memory, _), queries = library(), torch.randn(2, 4, 3, 8)
    without = copy.deepcopy(memory)
    for row in range(2):
        origins = without.store.origins[row, : without.num_entries[row]]
        without.remove(row, (origins[:, 0] == 1) & (origins[:, 1] >= 2) & (origins[:, 1] <= 5))
    assert without.num_entries == (10, 10)
    with memory.hidden.at(Hidden(1, 2, 5)):
        found = memory.retrieve(queries, topk)
    expected = without.retrieve(queries, topk)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.scores, expected.scores)
    origins = [each.origins(part.slots)[part.mask] for each, part in ((memory, found), (without, expected))]
    assert torch.equal(*origins)
    assert not bool(found.slots[~found.mask].any())


def test_a_look_up_in_mapped_files_keeps_what_it_found(tmp_path: Path) -> None:
    made = library()
    made.save(tmp_path / "memory")
    loaded = KNNMemoryList.load(tmp_path / "memory", mmap=True)
    assert loaded[0].store.room < loaded[0].max_memories
    lookup = loaded[0].look_up(torch.randn(2, 4, 3, 8), 5)
    origins, (table,) = lookup.origins(), lookup.tables()
    loaded.forget("one")
    add(loaded, 3, 2)
    assert torch.equal(lookup.origins(), origins)
    (after,) = lookup.tables()
    for name in ("keys", "values"):
        before, now = getattr(table, name), getattr(after, name)
        assert torch.equal(now.floats()[after.slots], before.floats()[table.slots])


def test_nothing_of_what_is_forgotten_stays_in_the_files_of_a_memory(tmp_path: Path) -> None:
    memory = KNNMemory(8, 20, directory=tmp_path)
    memory.add(torch.randn(1, 12, 2, 8), origins=torch.tensor([[0, 0, 0]] * 7 + [[1, 0, 0]] * 5)[None])
    memory.forget([1])
    for name in ("keys", "values"):
        assert bool(memory.store.tables[name][0, :, 6].any())
        assert not bool(memory.store.tables[name][0, :, 7:].any())
    assert not bool(memory.store.origins[0, 7:].any())


@pytest.mark.parametrize("how", ["cleared", "forgotten"])
def test_a_row_that_is_emptied_and_filled_as_far_again_is_saved_as_it_is(how: str, tmp_path: Path) -> None:
    made = library()
    made.save(tmp_path / "memory")
    if how == "cleared":
        for memory in made:
            memory.clear()
        add(made, 14, 3)
    else:
        made.forget("one")
        add(made, 5, 3)
    made.save(tmp_path / "memory")
    assert same(KNNMemoryList.load(tmp_path / "memory"), made)


def test_no_more_documents_are_evicted_than_must_be() -> None:
    memory = KNNMemory(8, 10, policy="by-document")

    def add_of(document: int, count: int, mask: torch.Tensor | None = None) -> list[int]:
        origins = torch.tensor([[document, 0, 0]] * count)[None]
        memory.add(torch.randn(1, count, 2, 8), mask, origins)
        return [origin.document for origin in memory.entries(0)]

    for document, count in ((0, 4), (1, 3), (2, 3)):
        add_of(document, count)
    assert add_of(3, 2) == [1, 1, 1, 2, 2, 2, 3, 3]
    assert add_of(4, 6, torch.arange(6)[None] < 2) == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4]  # what is masked needs no room
    assert add_of(5, 1) == [2, 2, 2, 3, 3, 4, 4, 5]


def test_entries_of_no_known_document_stay_so_in_a_merge() -> None:
    made, other = library(), memories()
    other.add([torch.randn(2, 2, 4, 2, 8) for _ in other])
    made.merge(other)
    assert [origin.document for origin in made.entries(0)] == [0] * 5 + [1] * 7 + [2] * 2 + [-1] * 4


def test_a_row_that_is_copied_over_a_longer_one_leaves_nothing_of_it() -> None:
    memory = KNNMemory(8, 20, 2)
    for row, count in ((0, 3), (1, 5)):
        with memory.at_batch_indices([row]):
            memory.add(torch.randn(1, count, 2, 8))
    made = KNNMemoryList([memory])
    made.copy_row(0, 1)
    assert memory.num_entries == (3, 3)
    first, second = contents(made)
    assert all(torch.equal(table, second[name]) for name, table in first.items())


def test_a_cleared_document_stays_known_while_an_older_one_is_stored_again() -> None:
    ledger = Ledger()
    numbers = [ledger.begin(title, 0, 0) for title in ("a", "b")]
    for number in numbers:
        ledger.grow(number, 5)
    ledger.clear([0])
    assert ledger.documents() == []
    for listed in (numbers[:1], numbers):
        ledger.note_stored(listed[-1:])
        assert [each.number for each in ledger.documents()] == listed


def test_a_row_that_was_overwritten_more_than_once_between_two_saves_is_saved_as_it_is(tmp_path: Path) -> None:
    made = memories()
    add(made, 50)
    for count in (71, 120):
        made.save(tmp_path / "memory")
        add(made, count)
    made.save(tmp_path / "memory")
    assert same(KNNMemoryList.load(tmp_path / "memory"), made)


def test_rows_that_were_cleared_are_empty_and_out_of_the_files_after_they_are_saved(tmp_path: Path) -> None:
    made = library()
    made.save(tmp_path / "memory")
    secret = made[0].store.keys.numbers[0, 0, 2].numpy().tobytes()
    for memory in made:
        memory.clear()
    made.save(tmp_path / "memory")
    assert KNNMemoryList.load(tmp_path / "memory")[0].num_entries == (0, 0)
    add(made, 2, 3)
    made.save(tmp_path / "memory", compact=True)
    assert same(KNNMemoryList.load(tmp_path / "memory"), made)
    assert not any(secret in path.read_bytes() for path in (tmp_path / "memory").iterdir() if path.is_file())
