"""A memory attached to a model can be closed, and opened again by the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface import attach_memory
from memorizing_transformers_pytorch.huggingface.reading import stops_of
from tests.huggingface.families import tiny
from tests.huggingface.test_attach import EVERYTHING, logits, tokens

AGING = {**EVERYTHING, "recent": 16, "chunk": 8}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("options", [EVERYTHING, AGING, {**EVERYTHING, "positions": "constant"}])
def test_a_loaded_memory_is_the_one_that_was_saved(tmp_path: Path, options: dict, mmap: bool) -> None:
    memory, query = attach_memory(tiny("llama"), retrieve="tokens", **options), tokens(2, 9)
    memory.read(tokens(2, 40), document=["one", "two"], progress=False)
    memory.save(tmp_path / "memory")
    expected, described = logits(memory.model, query), memory.documents()
    memory.clear()
    memory.load(tmp_path / "memory", mmap=mmap)
    assert torch.equal(logits(memory.model, query), expected)
    assert memory.documents() == described


@pytest.mark.parametrize("mmap", [False, True])
def test_reading_goes_on_after_loading_as_if_nothing_had_been(tmp_path: Path, mmap: bool) -> None:
    whole, query = attach_memory(tiny("llama"), retrieve="tokens", **AGING), tokens(1, 9)
    ids = tokens(1, 96)
    for part in ids.split(32, dim=1):
        whole.read(part, progress=False)
    broken = attach_memory(tiny("llama"), retrieve="tokens", **AGING)
    for part in ids.split(32, dim=1):
        if broken.documents():
            broken = attach_memory(tiny("llama"), retrieve="tokens", **AGING)
            broken.load(tmp_path / "memory", mmap=mmap)
        broken.read(part, progress=False)
        broken.save(tmp_path / "memory")
    assert torch.equal(logits(broken.model, query), logits(whole.model, query))


def test_other_weights_are_refused_unless_they_are_wanted(tmp_path: Path) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    memory.read(tokens(1, 20), progress=False)
    memory.save(tmp_path / "memory")
    with torch.no_grad():
        memory.model.model.embed_tokens.weight.mul_(2)
    before = memory.documents()
    with pytest.raises(ValueError, match="this memory was written by other weights"):
        memory.load(tmp_path / "memory")
    assert memory.documents() == before
    memory.load(tmp_path / "memory", other_weights=True)


def test_a_memory_of_other_layers_is_refused(tmp_path: Path) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "layers": [0]})
    memory.read(tokens(1, 20), progress=False)
    memory.save(tmp_path / "memory")
    memory.detach()
    other = attach_memory(memory.model, retrieve="tokens", **{**EVERYTHING, "layers": [1]})
    with pytest.raises(ValueError, match=r"expected a memory of .*layers.*\[1\].*got one of .*\[0\]"):
        other.load(tmp_path / "memory")


def test_a_forgotten_document_is_gone_from_every_layer_and_from_disk(tmp_path: Path) -> None:
    memory, other = (
        attach_memory(tiny("llama"), retrieve="tokens", **AGING),
        attach_memory(tiny("llama"), retrieve="tokens", **AGING),
    )
    memory.read(tokens(1, 40), document="secret", progress=False)
    memory.read(tokens(1, 24), document="open", progress=False)
    memory.save(tmp_path / "memory")
    assert memory.forget("secret") == 2 * 40
    memory.save(tmp_path / "memory")
    other.load(tmp_path / "memory")
    for each in (memory, other):
        assert [document.title for document in each.documents()] == ["open"]
        for site in each.layers.values():
            assert {origin.document for part in site.memories for origin in part.entries(0)} == {1}
    query = tokens(1, 9)
    assert torch.equal(logits(memory.model, query), logits(other.model, query))


def test_a_title_that_there_is_not_is_refused() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    memory.read(tokens(1, 20), document="one", progress=False)
    with pytest.raises(ValueError, match="no document is titled 'two'"):
        memory.forget("two")
    assert memory.layers[1].num_entries == (20,)


@pytest.mark.parametrize("skip_first", [0, 3])
def test_a_document_that_was_broken_off_can_be_read_to_its_end(skip_first: int) -> None:
    options = {**AGING, "skip_first": skip_first}
    whole, broken = (
        attach_memory(tiny("llama"), retrieve="tokens", **options),
        attach_memory(tiny("llama"), retrieve="tokens", **options),
    )
    before, ids, query = tokens(1, 13), tokens(1, 61), tokens(1, 9)
    for memory in (whole, broken):
        memory.read(before, progress=False)
    whole.read(ids, progress=False)
    stops = stops_of(61, 8, skip_first, 2)
    broken.read(ids[:, : stops[0]], progress=False)
    for stop in stops[1:]:
        broken.go_on(1, ids[0, :stop], progress=False)
    assert [each.tokens for each in broken.documents()] == [13, 61]
    for number, site in whole.layers.items():
        for part, other in zip(site.memories, broken.layers[number].memories, strict=True):
            assert list(part.entries(0)) == list(other.entries(0))
    assert torch.equal(logits(broken.model, query), logits(whole.model, query))


def test_only_the_last_document_can_go_on() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    for _ in range(2):
        memory.read(tokens(1, 20), progress=False)
    with pytest.raises(ValueError, match=r"expected more of the last document in the only row, .*got document 0"):
        memory.go_on(0, tokens(1, 30)[0])
    assert [each.tokens for each in memory.documents()] == [20, 20]


@pytest.mark.parametrize("options", [{**EVERYTHING, "recent": 10**6}, AGING, {**EVERYTHING, "positions": "constant"}])
def test_memories_that_were_built_apart_can_be_merged(tmp_path: Path, options: dict) -> None:
    """Keys are where they would be if one text had been read after the other, or have grown old a little earlier."""
    one, other, both = (attach_memory(tiny("llama"), retrieve="tokens", **options) for _ in range(3))
    first, second, query = tokens(1, 40), tokens(1, 24), tokens(1, 9)
    other.read(second, document="second", progress=False)
    other.save(tmp_path / "second")
    one.read(first, document="first", progress=False)
    one.merge(tmp_path / "second")
    both.read(first, document="first", progress=False)
    both.read(second, document="second", progress=False)
    assert [each.title for each in one.documents()] == ["first", "second"]
    assert [each.start for each in one.documents()] == [0, 40]
    held = {origin for part in one.layers[1].memories for origin in part.entries(0)}
    assert held == {origin for part in both.layers[1].memories for origin in part.entries(0)}
    if options is not AGING:
        torch.testing.assert_close(logits(one.model, query), logits(both.model, query))
    else:
        bare = one.layers[1].memories[1]
        place = next(i for i, origin in enumerate(bare.entries(0)) if origin[:2] == (1, 41))
        both.read(tokens(1, 32), progress=False)
        other_bare = both.layers[1].memories[1]
        same_place = next(i for i, origin in enumerate(other_bare.entries(0)) if origin[:2] == (1, 41))
        torch.testing.assert_close(
            bare.store.oldest(0, place + 1).keys.floats()[:, :, place],
            other_bare.store.oldest(0, same_place + 1).keys.floats()[:, :, same_place],
        )


def test_reading_that_stopped_amidst_a_piece_remembers_nothing_twice() -> None:
    memory, ids = (
        attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "chunk": 16, "skip_first": 4}),
        tokens(1, 60)[0],
    )
    memory.read(ids[:10], progress=False)
    memory.go_on(0, ids[:30], progress=False)
    memory.go_on(0, ids, progress=False)
    assert [origin.position for origin in memory.layers[1].memories[0].entries(0)] == list(range(4, 60))


def test_documents_that_are_held_stay_in_the_ledger_after_a_merge(tmp_path: Path) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "recent": 60})
    memory.read(tokens(1, 40), document="b", progress=False)
    memory.save(tmp_path / "b")
    memory.clear()
    memory.read(tokens(1, 40), document="a", progress=False)
    memory.merge(tmp_path / "b")
    memory.read(tokens(1, 40), document="c", progress=False)
    assert [(each.title, each.entries) for each in memory.documents()] == [(name, (40, 40)) for name in "abc"]


def test_rows_can_be_made_anew_after_loading_a_memory_of_other_sizes(tmp_path: Path) -> None:
    saved = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "recent": 60, "max_memories": 200})
    saved.read(tokens(1, 40), progress=False)
    saved.save(tmp_path / "memory")
    memory = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "recent": 20, "max_memories": 50})
    memory.load(tmp_path / "memory")
    memory.clear()
    memory.read(tokens(2, 40), progress=False)
    assert [part.max_memories for part in memory.layers[1].memories] == [20, 30]


def test_a_merge_with_what_other_weights_have_read_is_refused(tmp_path: Path) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    memory.read(tokens(1, 20), progress=False)
    with torch.no_grad():
        memory.model.model.embed_tokens.weight.mul_(2)
    new = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    with torch.no_grad():
        new.model.model.embed_tokens.weight.mul_(2)
    new.read(tokens(1, 20), progress=False)
    new.save(tmp_path / "new")
    with pytest.raises(ValueError, match="model weights changed after this memory was written"):
        memory.merge(tmp_path / "new")


def test_what_is_written_after_the_last_document_was_forgotten_is_another_one() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    for title in ("a", "b"):
        memory.read(tokens(1, 20), document=title, progress=False)
    memory.forget("b")
    with memory.writing("c"):
        logits(memory.model, tokens(1, 16))
    assert [(each.title, each.tokens) for each in memory.documents()] == [("a", 20), ("c", 16)]


def test_what_is_written_after_loading_is_another_document_than_those_before_the_forgotten_one(tmp_path: Path) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    for title in ("a", "b"):
        memory.read(tokens(1, 20), document=title, progress=False)
    memory.forget("b")
    memory.save(tmp_path / "memory")
    again = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    again.load(tmp_path / "memory")
    assert again.last_document is None
    with again.writing("c"):
        logits(again.model, tokens(1, 16))
    with again.writing("c"):
        logits(again.model, tokens(1, 16))
    assert [(each.title, each.tokens) for each in again.documents()] == [("a", 20), ("c", 32)]


def test_a_memory_is_not_merged_with_the_state_that_it_holds(tmp_path: Path) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    memory.read(tokens(1, 20), document="a", progress=False)
    memory.save(tmp_path / "memory")
    before, expected = memory.documents(), logits(memory.model, tokens(1, 9))
    with pytest.raises(ValueError, match="hold documents of the same saved state"):
        memory.merge(tmp_path / "memory")
    assert memory.documents() == before
    assert torch.equal(logits(memory.model, tokens(1, 9)), expected)
    memory.forget("a")
    memory.merge(tmp_path / "memory")
    assert [each.title for each in memory.documents()] == ["a"]


def test_a_merge_with_entries_of_another_dtype_is_refused(tmp_path: Path) -> None:
    other = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "dtype": torch.bfloat16})
    other.read(tokens(1, 20), progress=False)
    other.save(tmp_path / "other")
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING)
    with pytest.raises(ValueError, match=r"expected 1 rows and torch.float32"):
        memory.merge(tmp_path / "other")
    assert memory.documents() == []
