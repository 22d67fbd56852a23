"""Reading into a memory of spans: what is stored, what it is worth, and what becomes of it on disk."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface.recalling import Excerpt
from memorizing_transformers_pytorch.huggingface.searching import Query
from memorizing_transformers_pytorch.huggingface.spans import smoothed
from tests.huggingface.families import tiny
from tests.huggingface.spans import attached, close, logits, plain, read, recalled, tokens

by_content = pytest.mark.parametrize("content", ["kv", "tokens"])


def stored(memory: Any, row: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer, in the order in which they were read: keys (G, N, D), values, origins (N, 3)."""
    found = []
    for layer in memory.layers.values():
        (part,) = layer.memories
        _, keys, values, origins, _ = part.store.oldest(row, part.num_entries[row])
        found.append((keys.floats()[0].float(), values.floats()[0].float(), origins[0]))
    return found


def same(one: list[Any], other: list[Any], limit: float = 1e-4) -> bool:
    return all(
        torch.equal(a[2][:, 1:], b[2][:, 1:])
        and all(torch.allclose(a[i], b[i], atol=limit, rtol=limit) for i in (0, 1))
        for a, b in zip(one, other, strict=True)
    )


def shown(passages: list[Excerpt]) -> list[tuple[Any, ...]]:
    return [(each.title, each.position, each.tokens.tolist(), round(each.score, 5)) for each in passages]


@by_content
def test_rows_that_are_read_side_by_side_are_stored_as_each_alone(content: str) -> None:
    model, ids, lengths = tiny("llama", "sdpa"), tokens(3, 50), (50, 7, 33)
    mask = (torch.arange(50) < torch.tensor(lengths)[:, None]).long()
    memory = attached(model, content=content, chunk=16, overlap=5)
    memory.read(ids, mask, progress=False)
    together = [stored(memory, row) for row in range(3)]
    asked = [shown(memory.recall(tokens(1, 9, seed=1)[0], row=row)) for row in range(3)]
    assert [memory.place_of(row) for row in range(3)] == list(lengths)
    memory.detach()
    for row, length in enumerate(lengths):
        alone = read(attached(model, content=content, chunk=16, overlap=5), ids[row, :length])
        assert stored(alone)[0][2][:, 2].tolist() == ids[row, :length].tolist()
        assert stored(alone)[0][2][:, 1].tolist() == list(range(length))
        assert same(stored(alone), together[row])
        own = shown(alone.recall(tokens(1, 9, seed=1)[0]))
        assert [each[1:3] for each in own] == [each[1:3] for each in asked[row]]
        alone.detach()


def test_rows_never_mix() -> None:
    """What one row holds is nothing to the prompts of another."""
    model, ids, prompts = tiny("llama", "sdpa"), tokens(2, 60), tokens(2, 8, seed=1)
    memory = read(attached(model), ids)
    before = logits(model, prompts)
    for row in range(2):
        assert set(recalled(memory, row)[:, 0].tolist()) == {row}
    memory.clear(1)
    after = logits(model, prompts)
    assert torch.equal(after[0], before[0]) or close(after[:1], before[:1])
    assert close(after[1:], plain(memory, prompts)[1:])


@by_content
def test_pieces_overlap_but_each_token_is_stored_once(content: str) -> None:
    ids = tokens(1, 70)
    memory = read(attached(tiny("llama"), content=content, chunk=16, overlap=6), ids)
    assert [each[2][:, 2].tolist() for each in stored(memory)] == [ids[0].tolist()] * len(memory.layers)


@by_content
def test_a_document_that_is_gone_on_with_is_stored_as_read_at_once(content: str) -> None:
    model, ids = tiny("llama"), tokens(1, 80)
    options: dict[str, Any] = {"content": content, "chunk": 24, "overlap": 8}
    memory = read(attached(model, **options), ids)
    at_once = stored(memory)
    memory.detach()
    memory = read(attached(model, **options), ids[:, :40])  # where a piece ends
    memory.go_on(memory.last_document.number, ids[0], progress=False)
    assert same(stored(memory), at_once)
    assert [document.tokens for document in memory.documents()] == [80]
    with pytest.raises(ValueError, match="expected more of the last document"):
        memory.go_on(0, ids[0, :30], progress=False)
    with pytest.raises(ValueError, match="expected more of the last document"):
        memory.go_on(1, ids[0], progress=False)
    assert same(stored(memory), at_once)


@by_content
@pytest.mark.parametrize("known", [1, 20, 33, 41])
def test_a_document_that_was_broken_off_anywhere_is_stored_once(content: str, known: int) -> None:
    ids = tokens(1, 80)
    memory = read(attached(tiny("llama"), content=content, chunk=24, overlap=8), ids[:, :known])
    memory.go_on(0, ids[0], progress=False)
    for _, _, origins in stored(memory):
        assert origins[:, 1].tolist() == list(range(80))
        assert origins[:, 2].tolist() == ids[0].tolist()
    assert [document.tokens for document in memory.documents()] == [80]


@by_content
def test_scores_are_causal(content: str) -> None:
    """Changing a later token never changes an earlier loss, though passages are chosen block by block."""
    model, base = tiny("llama", "sdpa"), tokens(1, 70)
    memory = read(attached(model, content=content, chunk=32, every=8), tokens(1, 100, seed=1))
    with memory.read_only():
        (before,) = memory.score(base, progress=False)
        for place in (1, 31, 41):
            changed = base.clone()
            changed[0, place:] = 7
            (after,) = memory.score(changed, progress=False)
            torch.testing.assert_close(after[1:place], before[1:place], rtol=1e-4, atol=1e-4)
    assert before.isnan().nonzero().flatten().tolist() == [0]


@by_content
def test_scores_are_those_of_full_context_where_all_fits(content: str) -> None:
    """Piece by piece, each with all of the text before it as passages and recent tokens."""
    model, ids = tiny("llama", "sdpa"), tokens(1, 60)
    whole = logits(model, ids)[0, :-1]
    expected = torch.nn.functional.cross_entropy(whole, ids[0, 1:], reduction="none")
    memory = attached(model, content=content, span=40, every=4, chunk=20)
    (found,) = memory.score(ids, progress=False)
    torch.testing.assert_close(found[1:], expected, rtol=1e-4, atol=1e-4)
    assert memory.place_of(0) == 60


@by_content
def test_scores_inside_read_only_store_nothing_and_see_what_was_read(content: str) -> None:
    """The first block, before which there is nothing to find passages by, has none."""
    model, text, ids = tiny("llama", "sdpa"), tokens(1, 100, seed=1), tokens(1, 30)
    memory = read(attached(model, content=content, every=8), text)
    before = stored(memory)
    with memory.read_only():
        (found,) = memory.score(ids, progress=False)
    assert same(stored(memory), before, 0)
    assert memory.place_of(0) == 100
    bare = torch.nn.functional.cross_entropy(plain(memory, ids)[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(found[1:9], bare[:8], rtol=1e-4, atol=1e-4)
    assert float((found[9:] - bare[8:]).abs().min()) > 1e-4


def test_scores_of_rows_side_by_side_are_those_of_each_alone() -> None:
    model, ids = tiny("llama", "sdpa"), tokens(2, 50)
    mask = torch.ones(2, 50).long()
    mask[1, 20:] = 0
    memory = attached(model, chunk=24, every=8)
    memory.read(tokens(1, 60, seed=1), progress=False)
    with memory.read_only():
        alone = [memory.score(ids[row][mask[row].bool()], progress=False)[0] for row in range(2)]
    memory.clear()
    memory.read(tokens(1, 60, seed=1).expand(2, -1), progress=False)
    with memory.read_only():
        together = memory.score(ids, mask, progress=False)
    for own, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(own[1:], expected[1:], rtol=1e-4, atol=1e-4)


def test_reading_with_look_ups_stores_what_full_context_makes() -> None:
    """Values of deeper layers have seen the passages, all of what was read before."""
    model, ids = tiny("llama", "sdpa"), tokens(1, 60)
    memory = read(attached(model, content="kv", span=40), ids)
    expected = stored(memory)
    memory.detach()
    memory = attached(model, content="kv", span=40, chunk=20)
    memory.read(ids, progress=False, look_up=True)
    assert same(stored(memory), expected)
    memory.clear()
    memory.read(ids, progress=False)
    assert not same(stored(memory), expected)


@by_content
def test_a_forgotten_document_is_not_found_in_the_next_call(content: str) -> None:
    model, books = tiny("llama", "sdpa"), [tokens(1, 40, seed=seed) for seed in range(3)]
    memory = attached(model, content=content)
    for number, book in enumerate(books):
        memory.read(book, document=f"book {number}", progress=False)
    out = model(input_ids=books[1][:, 10:30])  # its own words
    assert 1 in recalled(memory)[:, 0].tolist()
    memory.forget("book 1")
    with torch.no_grad():
        model(input_ids=books[1][:, 30:36], past_key_values=out.past_key_values)
    assert set(recalled(memory)[:, 0].tolist()) <= {0, 2}
    assert {each.document for each in memory.recall(books[1][0, 10:30])} <= {0, 2}
    assert {each.document for row in memory.last_recalled for each in row} <= {0, 2}
    memory.detach()
    without = read(attached(model, content=content), books[0], books[2])
    found = logits(model, books[1][:, 10:30])
    assert len(recalled(without)) == 26
    without.detach()
    memory = read(attached(model, content=content), *books)
    memory.forget(1)
    assert torch.equal(logits(model, books[1][:, 10:30]), found)


@by_content
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.int8}, {"directory": "folder"}])
def test_what_is_saved_and_loaded_recalls_the_same(content: str, options: dict[str, Any], tmp_path: Path) -> None:
    if "directory" in options:
        options = {"directory": tmp_path / options["directory"]}
    model, ids, question = tiny("llama", "sdpa"), tokens(1, 9, seed=1), tokens(1, 12, seed=2)[0]
    memory = attached(model, content=content, **options)
    memory.read(tokens(1, 90), document="a book", progress=False)
    passages, before = shown(memory.recall(question)), logits(model, ids)
    memory.save(tmp_path / "saved")
    for mmap in (False, True):
        memory.clear()
        assert memory.recall(question) == []
        assert torch.equal(logits(model, ids), plain(memory, ids))
        memory.load(tmp_path / "saved", mmap=mmap)
        assert shown(memory.recall(question)) == passages
        assert torch.equal(logits(model, ids), before)
    memory.clear()
    memory.merge(tmp_path / "saved")
    assert shown(memory.recall(question)) == passages
    assert torch.equal(logits(model, ids), before)


@by_content
def test_what_is_merged_is_recalled_as_if_it_was_read_here(content: str, tmp_path: Path) -> None:
    model, books, question = tiny("llama", "sdpa"), [tokens(1, 60, seed=seed) for seed in range(2)], tokens(1, 9)[0]
    memory = attached(model, content=content)
    memory.read(books[1], document="second", progress=False)
    memory.save(tmp_path / "second")
    memory.detach()
    memory = attached(model, content=content)
    memory.read(books[0], document="first", progress=False)
    memory.merge(tmp_path / "second")
    merged = shown(memory.recall(question, passages=6)), logits(model, question[None])
    memory.detach()
    memory = attached(model, content=content)
    for title, book in zip(("first", "second"), books, strict=True):
        memory.read(book, document=title, progress=False)
    assert shown(memory.recall(question, passages=6)) == merged[0]
    assert torch.equal(logits(model, question[None]), merged[1])


@by_content
def test_a_memory_of_codes_is_close_to_one_of_floats(content: str) -> None:
    model, found = tiny("llama", "sdpa"), []
    for dtype in (torch.float32, torch.int8, torch.bfloat16):
        memory = read(attached(model, content=content, span=40, dtype=dtype), tokens(1, 40))
        found.append(logits(model, tokens(1, 9, seed=1)))
        memory.detach()
    for each in found[1:]:
        if content == "tokens":
            assert torch.equal(each, found[0])  # all is recalled, and read again
        else:
            assert 0 < float((each - found[0]).norm() / found[0].norm()) < 0.05


@by_content
def test_a_memory_that_is_smaller_than_the_text_keeps_its_end_in_order(content: str) -> None:
    model, ids = tiny("llama", "sdpa"), tokens(1, 130)
    memory = read(attached(model, content=content, max_memories=50, chunk=32, overlap=8), ids)
    assert stored(memory)[0][2][:, 1].tolist() == list(range(80, 130))
    slots = memory._recall.search._shared.state.memories[memory._recall.search.kept][0].store.places_in_order(0)
    assert slots.tolist() != sorted(slots.tolist())  # the ring has wrapped
    for passage in memory.recall(ids[0, 90:110], passages=9):
        start = passage.position
        assert passage.tokens.tolist() == ids[0, start : start + len(passage.tokens)].tolist()
    logits(model, ids[:, 90:110])
    places = recalled(memory)[:, 1].tolist()
    assert places == sorted(places)
    assert recalled(memory)[:, 2].tolist() == ids[0, places].tolist()
    assert min(places) == 80  # the first of what is left come along


def test_recalled_passages_name_their_document_and_place_in_it() -> None:
    class Words:
        def decode(self, ids: Tensor) -> str:
            return " ".join(map(str, ids.tolist()))

        def batch_decode(self, some: list[list[int]], **_: Any) -> list[str]:
            return [self.decode(torch.tensor(ids)) for ids in some]

    books = [tokens(1, 60, seed=seed) for seed in range(2)]
    memory = attached(tiny("llama"), tokenizer=Words())
    for number, book in enumerate(books):
        memory.read(book, document=f"book {number}", progress=False)
    found = memory.recall(books[1][0, 20:40])
    assert len(found) == memory.options.passages
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    for each in found:
        own = books[each.document][0, each.position : each.position + len(each.tokens)]
        assert each.title == f"book {each.document}"
        assert each.tokens.tolist() == own.tolist()
        assert each.text == Words().decode(own)
    assert len(memory.recall(books[1][0, 20:40], passages=1)) == 1
    logits(memory.model, books[1][:, 20:40])
    for each in memory.last_recalled[0]:
        assert each.tokens.tolist() == books[each.document][0, each.position :][: len(each.tokens)].tolist()


@pytest.mark.parametrize("finder", ["bm25", "both"])
def test_words_find_what_has_them(finder: str) -> None:
    pytest.importorskip("bm25s")
    model, ids = tiny("llama", "sdpa"), tokens(1, 300)
    ids[0, 200:204] = torch.tensor([1, 0, 1, 0])  # which are nowhere else
    memory = read(attached(model, finder=finder, content="tokens"), ids)
    found = memory.recall(torch.tensor([1, 0, 1, 0]), passages=3)
    assert any({0, 1} <= set(each.tokens.tolist()) for each in found)
    memory.forget(0)
    assert memory.recall(torch.tensor([1, 0])) == []
    read(memory, ids[:, :100])
    assert all(each.position < 100 for each in memory.recall(torch.tensor([5, 6])))


@pytest.mark.parametrize("lengths", [(7,), (81,), (300, 41, 130)])
def test_words_score_the_passage_around_each_entry_most_at_its_middle(lengths: tuple[int, ...]) -> None:
    bm25s = pytest.importorskip("bm25s")
    texts = [tokens(1, count, seed=count) for count in lengths]
    memory = read(attached(tiny("llama"), finder="bm25", content="tokens"), *texts)
    store, question = next(iter(memory.layers.values())).memories[0].store, torch.tensor([5, 6, 7])
    origins = store.origins[0][store.places_in_order(0)]
    starts = torch.tensor([sum(lengths[:i]) for i, count in enumerate(lengths) for _ in range(count)])
    found = memory._at_work.recall.search._words.scores(store, 0, question, origins, starts)
    passages, middles = [], []
    for begin, text in zip(itertools.accumulate((0, *lengths)), texts, strict=False):
        ids = text[0].tolist()
        for start in range(0, max(len(ids) - 40, 1), 40):
            passages.append([str(each) for each in ids[start : start + 80]])
            middles.append((begin, begin + len(ids), begin + min(start + 40, len(ids) - 1)))
    index = bm25s.BM25()
    index.index(passages, show_progress=False)
    scores = index.get_scores([str(each) for each in question.tolist()])
    for place, value in enumerate(found.tolist()):
        own = [(abs(m - place), i) for i, (begin, end, m) in enumerate(middles) if begin <= place < end]
        near = [i for distance, i in own if distance == min(own)[0]]
        expected = [scores[i] * (1 - min(own)[0] / 800) for i in near]
        assert any(value == pytest.approx(each, abs=1e-5) for each in expected)


def test_the_head_and_words_together_score_by_their_mean() -> None:
    """Each as a share of its best; of the head the square root of its attention."""
    pytest.importorskip("bm25s")
    memory = read(attached(tiny("llama", "sdpa"), finder="both"), tokens(1, 300), tokens(1, 90, seed=1))
    search, question = memory._at_work.recall.search, tokens(1, 9, seed=2)[0]
    store = next(iter(memory.layers.values())).memories[0].store
    (vectors,) = search._vectors([Query(0, question)])
    row = search._row(store, Query(0, question))
    found = search._scores(store, Query(0, question), vectors, row)
    keys = torch.cat([part[0, 0, :390].floats(torch.float32) for part in (store.keys, store.values)], dim=-1)
    head = smoothed((vectors @ keys.T).softmax(dim=-1).sqrt().mean(dim=0), row.starts)
    words = search._words.scores(store, 0, question, row.origins, row.starts)
    torch.testing.assert_close(found, (head / head.max() + words / words.max()) / 2)
    part = search._row(store, Query(0, question, before=50))
    alone = search._scores(store, Query(0, question, before=50), vectors, part)
    torch.testing.assert_close(alone, smoothed((vectors @ keys.T).softmax(dim=-1).mean(dim=0)[:50], part.starts))
