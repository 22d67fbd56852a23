"""Which entries are recalled, and what the finder's head sees, against slow and obvious versions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface import spans
from memorizing_transformers_pytorch.huggingface.cache_layers import Prefix
from memorizing_transformers_pytorch.huggingface.calls import Shared, State
from memorizing_transformers_pytorch.huggingface.finder import Finder, Head
from memorizing_transformers_pytorch.huggingface.probe import Layer, probe
from memorizing_transformers_pytorch.huggingface.searching import Query, _unique
from memorizing_transformers_pytorch.memory.ledger import Ledger
from tests.huggingface.families import FEW, LEARNED_POSITIONS, tiny
from tests.huggingface.spans import attached, last_head, tokens


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("block", [1, 3, 7, 20, 50])
def test_attention_in_blocks_is_one_softmax(block: int, power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, seen = torch.randn(5, 4) * 3, torch.randn(20, 4) * 3, []
    monkeypatch.setattr(spans, "BLOCK", block)

    def some(places: slice) -> Tensor:
        seen.append(places.stop - places.start)
        return keys[places]

    found = spans.attention(queries, some, 20, power)
    torch.testing.assert_close(found, ((queries @ keys.T).softmax(dim=-1) ** power).mean(dim=0))
    assert max(seen) <= block


@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=5), st.integers(0, 1_000))
def test_the_beginnings_of_documents_are_found_and_never_a_hit(documents: list[Any], seed: int) -> None:
    """The same document may come twice, in which case it begins once."""
    numbers, expected = list[int](), list[int]()
    for count, is_new in documents:
        number = numbers[-1] + 1 if numbers and is_new else numbers[-1] if numbers else 0
        begin = expected[-1] if numbers and not is_new else len(numbers)
        numbers += [number] * count
        expected += [begin] * count
    starts = spans.starts_of(torch.tensor(numbers))
    assert starts.tolist() == expected
    weights = torch.rand(len(numbers), generator=torch.Generator().manual_seed(seed))
    kept = [0.0 if i - start < spans.SINKS else float(weights[i]) for i, start in enumerate(expected)]
    half = spans.SMOOTHED // 2
    means = [sum(kept[max(i - half, 0) : i + half + 1]) / spans.SMOOTHED for i in range(len(kept))]
    torch.testing.assert_close(spans.smoothed(weights, starts), torch.tensor(means))


def chosen_slowly(scores: list[float], starts: list[int], count: int, span: int, first: int) -> tuple[list[int], int]:
    """Which entries, and how many hits were used."""
    total, left, taken, used = len(scores), list(scores), set[int](), 0
    if count >= total:
        return list(range(total)), min(1, int(max(scores) > 0))
    while max(left) > 0 and len(taken) < count:
        place = left.index(max(left))
        begin = max(place - span // 2, starts[place])
        near = [i for i in range(begin, min(place - span // 2 + span, total)) if starts[i] == starts[place]]
        if not used:
            taken |= {i for i in range(starts[place], starts[place] + first) if i <= near[-1]}
            taken = set(sorted(taken)[:count])
            if len(taken) == count:
                break
        used += 1
        for i in sorted(near, key=lambda i: (abs(i - place), i)):
            if len(taken) < count:
                taken.add(i)
        apart = span // 2 + spans.SMOOTHED // 2
        left = [0.0 if abs(i - place) <= apart else each for i, each in enumerate(left)]
    for i in reversed(range(total)):
        if len(taken) < count:
            taken.add(i)
    return sorted(taken), used


@st.composite
def texts(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    """Scores of the entries of a few documents, and where the document of each begins."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    starts = [sum(lengths[:i]) for i, length in enumerate(lengths) for _ in range(length)]
    places = draw(st.permutations(range(len(starts))))
    return [float(place) if place % 3 else 0.0 for place in places], starts


@given(texts(), st.integers(1, 60), st.integers(1, 20), st.integers(0, 6))
def test_exactly_as_many_entries_are_chosen_as_by_hand(text: Any, count: int, span: int, first: int) -> None:
    scores, starts = text
    found = spans.choose(torch.tensor(scores), torch.tensor(starts), count, span, first)
    expected, used = chosen_slowly(scores, starts, count, span, first)
    assert found.places.tolist() == expected
    assert len(expected) == min(count, len(scores))
    assert len(found.hits) == used
    places = [expected[hit.place] if hit.place < len(expected) else -1 for hit in found.hits]
    assert [hit.score for hit in found.hits] == sorted((hit.score for hit in found.hits), reverse=True)
    assert [scores[place] for place in places] == [hit.score for hit in found.hits]
    if used:
        assert places[0] == scores.index(max(scores))
        begin = starts[places[0]]
        assert set(range(begin, min(begin + first, places[0] + 1))) <= set(expected)


@given(texts(), st.integers(1, 20), st.data())
def test_what_is_around_an_entry_stays_in_its_document(text: Any, span: int, data: st.DataObject) -> None:
    _, starts = text
    place = data.draw(st.integers(0, len(starts) - 1))
    found = spans.around(place, torch.tensor(starts), span).tolist()
    assert place in found
    assert len(found) <= span
    assert found == list(range(found[0], found[-1] + 1))
    assert {starts[i] for i in found} == {starts[place]}


@given(texts(), st.integers(0, 20))
def test_hits_come_best_first_and_keep_their_distance(text: Any, apart: int) -> None:
    scores = torch.tensor(text[0])
    found = list(spans.hits(scores, apart))
    assert scores.tolist() == text[0]
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    places = [hit.place for hit in found]
    assert all(abs(one - other) > apart for i, one in enumerate(places) for other in places[:i])
    missed = [i for i, score in enumerate(text[0]) if score and not any(abs(i - place) <= apart for place in places)]
    assert missed == []


def finder_of(model: Any, head: int) -> tuple[Finder, Layer]:
    served = probe(model)[0]
    layer = served[max(served)]
    return Finder(layer, Head(layer.index, head, 1.0), Shared(model, State({}, Ledger(), []))), layer


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gpt_neox", "cohere", "gemma3_text", "smollm3", "gpt2"])
def test_the_finder_sees_the_queries_and_keys_of_its_head_before_they_are_turned(family: str) -> None:
    """Queries of the layer are scaled; the logits of the head at any distance are those of the model when turned."""
    model = tiny(family)
    finder, layer = finder_of(model, 2)
    ids = tokens(2, 12)
    module: Any = layer.module
    before = copy.copy(vars(module)), module.config._attn_implementation
    finder.attach()
    query, key = finder.vectors(model, ids)
    assert (vars(module), module.config._attn_implementation) == before
    assert query.shape == key.shape == (2, 12, layer.width)
    assert query.dtype == key.dtype == torch.float32
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True).attentions[layer.index][:, 2]
    finder.detach()
    if layer.rotary is not None:
        places = torch.arange(12)[None]
        query, key = (layer.rotary.turned(each[:, None], places)[:, 0] for each in (query, key))
    scores = query @ key.mT
    scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf)
    torch.testing.assert_close(scores.softmax(dim=-1), weights, rtol=1e-4, atol=1e-4)


def test_a_key_before_it_is_turned_does_not_depend_on_its_place_in_the_first_layer() -> None:
    model = tiny("llama")
    served = probe(model)[0]
    finder = Finder(served[0], Head(0, 3, 1.0), Shared(model, State({}, Ledger(), [])))
    finder.attach()
    query, key = finder.vectors(model, torch.tensor([[7, 8, 9, 7, 7]]))
    for each in (query, key):
        torch.testing.assert_close(each[0, 0], each[0, 3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(each[0, 0], each[0, 4], rtol=1e-4, atol=1e-5)
    attention: Any = served[0].module
    embedded = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor([7])))
    expected = attention.k_proj(embedded).view(2, 8)[1]
    torch.testing.assert_close(key[0, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FEW if family not in LEARNED_POSITIONS])
def test_padding_on_the_right_changes_no_vector(family: str) -> None:
    model = tiny(family)
    finder, _ = finder_of(model, 1)
    finder.attach()
    ids, mask = tokens(2, 10), torch.ones(2, 10).long()
    mask[1, 6:] = 0
    query, key = finder.vectors(model, ids, mask)
    alone = finder.vectors(model, ids[1:, :6])
    torch.testing.assert_close((query[1:, :6], key[1:, :6]), alone, rtol=1e-4, atol=1e-5)


def test_the_finder_leaves_training_and_gradients_as_they_are() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    memory = attached(model)
    modes = {name: module.training for name, module in model.named_modules()}
    memory.read(tokens(1, 30), progress=False)
    memory.recall(tokens(1, 5)[0])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    assert last_head(model, probe(tiny("llama"))[0]) == memory.finder


@given(st.lists(st.tuples(st.sampled_from(["note", "drop", "take"]), st.integers(1, 9)), max_size=8))
def test_a_prefix_counts_as_a_list_does(steps: list[tuple[str, int]]) -> None:
    prefix, rows, passed, next_token = Prefix(torch.ones(2, 3).bool()), [[], []], 0, 0
    for what, count in steps:
        if what == "note":
            new = torch.arange(next_token, next_token + len(rows) * count).view(len(rows), count)
            next_token += new.numel()
            prefix.note(new, 6)
            rows, passed = [(row + own)[-6:] for row, own in zip(rows, new.tolist(), strict=True)], passed + count
        elif what == "drop":
            prefix.drop_last(count)
            rows, passed = [row[: max(len(row) - count, 0)] for row in rows], max(passed - count, 0)
        else:
            order = [(i * count + 1) % len(rows) for i in range(2)]
            prefix.take(torch.tensor(order))
            rows = [rows[i] for i in order]
        assert (prefix.tokens.tolist() if prefix.tokens is not None else [[], []]) == rows
        assert prefix.passed == passed
        assert prefix.size == 3
        assert prefix.shift == 3


def test_the_same_question_is_found_by_once_unless_more_is_known_of_it() -> None:
    question, other = torch.tensor([1, 2, 3]), torch.tensor([1, 2])
    known = [Query(0, question, vectors=torch.zeros(3, 4)), Query(0, question, vectors=torch.ones(3, 4))]
    queries = [Query(0, question), Query(0, question), Query(1, question), Query(0, other), *known]
    unique, which = _unique(queries)
    assert which == [0, 0, 1, 2, 3, 4]
    assert all(torch.equal(unique[i].tokens, query.tokens) for i, query in zip(which, queries, strict=True))
    assert all(unique[i].vectors is query.vectors for i, query in zip(which, queries, strict=True))
