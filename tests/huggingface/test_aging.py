"""Entries that grow old are as far away as one distance tells, recent ones as far as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface import attach_memory
from memorizing_transformers_pytorch.huggingface.models import run
from memorizing_transformers_pytorch.huggingface.probe import probe, watching
from tests.huggingface.families import tiny
from tests.huggingface.test_attach import EVERYTHING, logits, tokens

ONE: dict[str, Any] = {"layers": [0], "skip_first": 0, "index": "exact", "dtype": torch.float32, "topk": 64}


class FirstLayer:
    """Queries (H, T, D), keys and values (G, T, D) of the first layer, when tokens stand at a place."""

    def __init__(self, model: Any) -> None:
        self._model, self._modules = model, {0: probe(model)[0][0].module}

    def __call__(self, ids: Tensor, place: int) -> tuple[Tensor, Tensor, Tensor]:
        with watching(self._model, self._modules) as seen:
            run(self._model, ids, place)
        assert seen[0].query is not None
        assert seen[0].local is not None
        return seen[0].query[0], seen[0].local.key[0], seen[0].local.value[0]

    def each(self, ids: Tensor, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each token by itself at the same place."""
        parts = zip(*(self(token, place) for token in ids.split(1, dim=1)), strict=True)
        queries, keys, values = (torch.cat(part, dim=1) for part in parts)
        return queries, keys, values


@pytest.mark.parametrize("recent", [1, 7, 20, 33])
def test_the_first_layer_attends_as_a_plain_softmax_over_keys_at_two_kinds_of_distances(recent: int) -> None:
    """The slow, obvious way: run the tokens where they are, and the old ones at 0 with the queries at the distance."""
    model, book, ids, distance = tiny("llama"), tokens(1, 33), tokens(1, 5, seed=1), 50
    first = FirstLayer(model)
    now, here = first(ids, 33), first(book, 0)
    far, old = first.each(ids, distance), first.each(book, 0)
    memory = attach_memory(model, retrieve="tokens", **ONE, recent=recent, distance=distance, chunk=9)
    memory.read(book, progress=False)
    outs: list[Tensor] = []
    out = memory.layers[0].layer.module.o_proj
    out.register_forward_pre_hook(lambda _, inputs: outs.append(inputs[0]))
    logits(model, ids)

    ahead, expected = torch.ones(5, 5).triu(1).bool(), []
    for head in range(4):
        kv, border = head // 2, 33 - recent
        from_old = far[0][head] @ old[1][kv, :border].mT
        from_recent = now[0][head] @ here[1][kv, border:].mT
        local = (now[0][head] @ now[1][kv].mT).masked_fill(ahead, -torch.inf)
        weights = (torch.cat((from_old, from_recent, local), dim=1) * 8**-0.5).softmax(dim=1)
        expected.append(weights @ torch.cat((here[2][kv], now[2][kv])))
    torch.testing.assert_close(outs[0][0], torch.cat(expected, dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("recent", "capacity"), [(5, 20), (8, 100), (30, 40), (16, 16)])
def test_no_entry_is_lost_but_the_oldest_of_all(recent: int, capacity: int) -> None:
    model, ids = tiny("llama"), tokens(2, 61)
    mask = torch.ones_like(ids)
    mask[1, 31:] = 0
    memory = attach_memory(model, retrieve="tokens", **ONE, recent=recent, max_memories=capacity, chunk=11)
    memory.read(ids, mask, progress=False)
    for row, length in enumerate((61, 31)):
        kept = []
        for part in reversed(memory.layers[0].memories):
            store = part.store
            kept += store.oldest(row, part.num_entries[row]).origins[0, :, 1].tolist()
        assert kept == list(range(max(length - capacity, 0), length))


def test_old_keys_are_those_of_constant_positions() -> None:
    model, ids = tiny("phi", "sdpa"), tokens(1, 40)
    stores = []
    for options in ({"recent": 4}, {"positions": "constant"}):
        memory = attach_memory(model, retrieve="tokens", **ONE, **options, chunk=40)
        memory.read(ids, progress=False)
        stores.append(memory.layers[0].memories[-1].store.keys[0, :, :36].floats().clone())
        memory.detach()
    torch.testing.assert_close(*stores, rtol=1e-4, atol=1e-4)


def test_codes_that_grow_old_stay_close_to_the_keys() -> None:
    """They are turned as the numbers they stand for, and become codes once more: an error of twice half a scale."""
    stores = []
    for dtype in (torch.float32, torch.int8):
        memory = attach_memory(tiny("llama"), retrieve="tokens", **{**ONE, "dtype": dtype}, recent=4, chunk=9)
        memory.read(tokens(1, 40), progress=False)
        recent, older = memory.layers[0].memories
        assert (recent.num_entries, older.num_entries, older.dtype) == ((4,), (36,), dtype)
        stores.append((older.store.keys[0, :, :36].floats(), older.store.values[0, :, :36].floats()))
    for (exact, codes), scales in zip(zip(*stores, strict=True), (2.0, 0.5001), strict=True):
        longest = exact.norm(dim=-1, keepdim=True)  # turning changes the largest number, but not the length
        assert bool(((codes - exact).abs() <= scales * longest / 127).all())


def test_more_than_the_recent_part_holds_may_come_at_once() -> None:
    model, ids = tiny("llama"), tokens(1, 40)
    found = []
    for chunk in (40, 3):
        memory = attach_memory(model, retrieve="tokens", **ONE, recent=3, chunk=chunk)
        with memory.enabled(False):
            memory.read(ids, progress=False)
        found.append([part.store.origins[0, : part.num_entries[0], 1].tolist() for part in memory.layers[0].memories])
        memory.detach()
    assert sorted(found[0][0]) == sorted(found[1][0]) == [37, 38, 39]
    assert found[0][1] == found[1][1] == list(range(37))


def test_half_of_the_context_is_recent_unless_told() -> None:
    assert (
        attach_memory(tiny("llama", max_position_embeddings=100), retrieve="tokens", layers=[0]).layers[0].recent == 50
    )
    assert (
        attach_memory(tiny("smollm3"), retrieve="tokens", layers=[1]).layers[1].recent is None
    )  # no rotary embeddings there
    assert attach_memory(tiny("llama"), retrieve="tokens", layers=[0], positions="constant").layers[0].recent is None
    with pytest.raises(ValueError, match="expected recent to be at least 1, got 0"):
        attach_memory(tiny("llama"), retrieve="tokens", layers=[0], recent=0)


def test_positions_of_what_was_looked_up_are_those_in_its_document() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **ONE, recent=5)
    memory.read(tokens(1, 12), document="one", progress=False)
    memory.read(tokens(1, 9, seed=1), document="two", progress=False)
    logits(memory.model, tokens(1, 3, seed=2))
    origins = memory.last_retrieved[0]
    found = {tuple(origin) for origin in origins[0, 0, 0, :, :2].tolist()}
    assert found == {(-1, -1), *((0, place) for place in range(12)), *((1, place) for place in range(9))}
    assert [document.start for document in memory.documents()] == [0, 12]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_knows_where_late_tokens_stand(dtype: torch.dtype) -> None:
    """Keys of the first layer depend on nothing but token and place."""
    ids, found = tokens(1, 3_000), []
    for each in (torch.float32, dtype):
        model = tiny("llama", max_position_embeddings=8192)
        frequencies = model.model.rotary_emb.inv_freq
        model.to(each).model.rotary_emb.inv_freq = frequencies  # as from_pretrained leaves them
        memory = attach_memory(model, retrieve="tokens", **ONE)
        memory.read(ids, progress=False)
        found.append(memory.layers[0].memories[0].store.keys[0, :, 2_500:3_000].floats(torch.float32))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.02


def test_more_entries_than_the_longest_context_weigh_as_much_as_those_of_one_context() -> None:
    """Three times the same is the same, and not three times as much."""
    model = tiny("llama", max_position_embeddings=32)
    memory, query = (
        attach_memory(model, retrieve="tokens", **{**EVERYTHING, "positions": "constant", "topk": 96}),
        tokens(1, 9),
    )
    memory.read(tokens(1, 32), progress=False)
    once = logits(model, query)
    for site in memory.layers.values():
        (part,) = site.memories
        known = part.store.oldest(0, 32)
        for _ in range(2):
            part.commit(known)
    torch.testing.assert_close(logits(model, query), once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["merge", "forget", "too short to be remembered"])
def test_what_is_far_behind_is_old_however_few_entries_are_there(how: str, tmp_path: Path) -> None:
    """Then all of it is, and the memory is that of one which knows no other distance."""
    found = []
    for options in ({"recent": 64}, {"positions": "constant"}):
        memory = attach_memory(tiny("llama"), retrieve="tokens", **{**EVERYTHING, "skip_first": 4}, **options)
        if how == "merge":
            memory.read(tokens(1, 300, seed=3), document="long", progress=False)
            memory.save(tmp_path / memory.options.positions)
            memory.clear()
        memory.read(tokens(1, 40), document="short", progress=False)
        if how == "merge":
            memory.merge(tmp_path / memory.options.positions)
        for i in range(20):
            if how == "forget":
                memory.read(tokens(1, 60, seed=i), document="other", progress=False)
                memory.forget("other")
            elif how == "too short to be remembered":
                memory.read(tokens(1, 4, seed=i), document="tiny", progress=False)
        recent = memory.layers[0].memories[0]
        if memory.options.positions == "true":
            assert recent.num_entries == (0,)
        found.append(logits(memory.model, tokens(1, 9, seed=1)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)  # turned and turned back


def test_documents_tell_the_entries_of_each_layer_where_some_have_no_positions() -> None:
    model = tiny("smollm3", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], layer_types=["full_attention"] * 4)
    memory = attach_memory(model, retrieve="tokens", layers="all", skip_first=4, recent=64)
    memory.read(tokens(1, 300), document="a book", progress=False)
    (document,) = memory.documents()
    assert document.entries == (296,) * 4


def test_just_as_far_behind_as_the_recent_part_reaches_is_recent() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **{**ONE, "skip_first": 3}, recent=20, chunk=9)
    for seed in range(7):  # the first three of nine are not remembered
        with memory.writing():
            logits(memory.model, tokens(1, 9, seed=seed))
    memory.read(tokens(1, 1), progress=False)  # too short to be remembered, but the row stands at place 64 now
    positions = [part.store.oldest(0, 99).origins[0, :, 1].tolist() for part in memory.layers[0].memories]
    written = [9 * segment + place for segment in range(7) for place in range(3, 9)]
    assert positions == [[place for place in written if place >= 44], [place for place in written if place < 44]]


def test_what_stands_before_a_forgotten_document_is_demoted_as_the_next_one_grows() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **{**ONE, "skip_first": 0}, recent=20, chunk=5)
    for title, seed in (("first", 0), ("second", 1)):
        memory.read(tokens(1, 10, seed=seed), document=title, progress=False)
    memory.forget("second")
    memory.read(tokens(1, 15, seed=2), document="third", progress=False)  # at places 20 to 34; 10 to 19 are gone
    recent, older = (part.store.oldest(0, 99).origins[0, :, 1].tolist() for part in memory.layers[0].memories)
    assert older == list(range(10))  # more than 20 places before 35
    assert recent == list(range(20, 35))
