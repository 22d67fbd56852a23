"""What is explained is what the layers do: weights, masses and sources, compared with the slow references."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.data.tokenizer import ByteTokenizer
from memorizing_transformers_pytorch.explorer import Explanation, explain
from memorizing_transformers_pytorch.explorer.page import page
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.model.generation import generate
from memorizing_transformers_pytorch.model.session import Session

TEXTS = {"one": "It was the best of times, it was the worst of times.", "two": "Call me Ishmael. Some years ago."}

COLUMNS = [
    "token", "layer", "head", "score", "weight", "document", "title", "position", "source_token", "text", "age"
]  # fmt: skip


def ours(**options: Any) -> tuple[MemorizingTransformer, KNNMemoryList]:
    """A model that has read both texts, each as a document."""
    torch.manual_seed(0)
    options = {"depth": 3, "memorizing_layers": (2, 3), "heads": 3, "num_retrieved_memories": 5, **options}
    model = MemorizingTransformer(num_tokens=256, dim=24, dim_head=8, **options).eval()
    memories = model.create_knn_memories(batch_size=2)
    for title, text in TEXTS.items():
        number = memories.ledger.begin(title, 1, 0)
        tokens = ByteTokenizer().encode(text)
        with memories.at_batch_indices([1]):
            session = Session(model, memories, batch_size=1, segment_length=16, documents=[number])
            session.read([tokens])
            session.close()
        memories.ledger.grow(number, len(tokens))
    return model, memories


def attached(family: str = "llama", **options: Any) -> tuple[Any, Any]:
    pytest.importorskip("transformers")
    from memorizing_transformers_pytorch.huggingface import attach_memory
    from tests.huggingface.families import tiny

    model = tiny(family)
    model.resize_token_embeddings(256)
    memory = attach_memory(
        model, retrieve="tokens", **{"layers": "all", "topk": 5, "skip_first": 0, "index": "exact", **options}
    )
    for title, text in TEXTS.items():
        memory.read(torch.tensor(ByteTokenizer().encode(text)), document=title, progress=False)
    return model, memory


def explained(kind: str, prompt: str = "the best of", **options: Any) -> Explanation:
    model, memory = ours() if kind == "ours" else attached(**({"recent": 20} if kind == "aging" else {}))
    return explain(model, prompt, memory, tokenizer=ByteTokenizer(), row=1 if kind == "ours" else 0, **options)


KINDS = pytest.mark.parametrize("kind", ["ours", "attached", "aging"])


@KINDS
def test_the_weights_of_a_token_add_up_to_its_attention_on_the_memory(kind: str) -> None:
    found = explained(kind)
    assert found.mass.shape[1:] == (found.mass.shape[1], 11)
    for i, layer in enumerate(found.layers):
        for head in range(found.mass.shape[1]):
            own = (found.columns["layer"] == layer) & (found.columns["head"] == head)
            sums = np.bincount(found.columns["token"][own], found.columns["weight"][own], minlength=11)
            np.testing.assert_allclose(sums, found.mass[i, head], rtol=1e-5, atol=1e-6)
    assert found.mass.min() >= 0
    assert found.mass.max() <= 1 + 1e-5
    assert found.mass.max() > 0.01
    assert sum(each["weight"] for each in found.by_document()) == pytest.approx(found.mass_of_tokens().sum(), rel=1e-4)
    assert np.mean([each["mass"] for each in found.by_layer()]) == pytest.approx(found.mass.mean())


def test_the_mass_of_our_layers_is_that_of_one_softmax_over_all_keys() -> None:
    """Written out for one head and token, from queries and keys."""
    model, memories = ours(depth=1, memorizing_layers=1, heads=1)
    tokens = ByteTokenizer().encode("best")
    found = explain(model, tokens, memories, row=1)
    attention: Any = model.layers[0][0].fn
    with torch.no_grad():
        x = model.layers[0][0].norm(model.token_emb(torch.tensor([tokens])))
        queries, pairs, _ = attention._project(x, None, None)
        bias = model.knn_rel_pos_bias(model.initial_state(1).distances(4, None, with_past=False))
        scale = attention.scale.exp().flatten()[0]
        local = (queries[0, 0] @ pairs[0, 0, :, 0].T) * scale + bias.reshape(-1, 4, 4)[0]
        with memories.at_batch_indices([1]):
            scores = memories[0].retrieve(queries.squeeze(1), 5).scores[0] * scale
    for token in range(4):
        everything = [*local[token, : token + 1].tolist(), *scores[token].tolist()]
        total = sum(math.exp(logit) for logit in everything)
        mass = sum(math.exp(logit) for logit in scores[token].tolist()) / total
        assert found.mass[0, 0, token] == pytest.approx(mass, rel=1e-4)


@KINDS
def test_sources_are_where_the_tokens_were_read(kind: str) -> None:
    found = explained(kind)
    assert {each["title"] for each in found.by_document()} == set(TEXTS)
    for entry in list(found)[:200]:
        text = TEXTS[entry.title]
        assert text[entry.position] in entry.text
        assert entry.text == text[max(entry.position - 12, 0) : entry.position + 13]
        assert entry.age > 0
    weights = [entry.weight for entry in found]
    assert weights == sorted(weights, reverse=True)
    assert {entry.token for entry in found.of_token(3)} == {3}


@KINDS
def test_explaining_changes_nothing(kind: str) -> None:
    model, memory = ours() if kind == "ours" else attached(**({"recent": 20} if kind == "aging" else {}))
    memories = memory if kind == "ours" else memory._contents.memories()
    row = 1 if kind == "ours" else 0
    before = [list(each.entries(row)) for each in memories]
    first = explain(model, [1, 2, 3], memory, row=row, contribution="ablate")
    assert [list(each.entries(row)) for each in memories] == before
    again = explain(model, [1, 2, 3], memory, row=row)
    np.testing.assert_array_equal(first.losses, again.losses)


@KINDS
def test_what_a_passage_is_worth_is_the_loss_without_it(kind: str) -> None:
    """Against a memory that has never read it."""
    found = explained(kind, contribution="ablate", passage=1_000)
    worth = {each.title: each.contribution for each in found.passages}
    assert worth.keys() == TEXTS.keys()
    model, memory = ours() if kind == "ours" else attached(**({"recent": 20} if kind == "aging" else {}))
    memory.forget("two")
    row = 1 if kind == "ours" else 0
    left = explain(model, "the best of", memory, tokenizer=ByteTokenizer(), row=row)
    expected = np.nansum(left.losses) - np.nansum(found.losses)
    assert worth["two"] == pytest.approx(expected, abs=1e-4)


def test_the_passage_that_tells_a_fact_is_worth_most() -> None:
    """A layer that copies: of many passages, the one with the continuation lowers the loss."""
    torch.manual_seed(0)
    model = MemorizingTransformer(
        num_tokens=64, dim=64, depth=1, heads=1, dim_head=64, memorizing_layers=1, num_retrieved_memories=4,
        short_conv=4, qk_init="induction", tie_embeddings=True,
    ).eval()  # fmt: skip
    attention: Any = model.layers[0][0].fn
    with torch.no_grad():
        attention.to_kv.weight[attention.to_kv.weight.shape[0] // 2 :] = torch.eye(64)
        attention.to_out.weight.copy_(torch.eye(64) * 8)
        attention.scale.fill_(3.0)
    memories = model.create_knn_memories(batch_size=1)
    numbers = torch.randperm(64)
    for i, piece in enumerate(numbers.view(8, 8)):
        document = memories.ledger.begin(f"part {i}", 0, 0)
        session = Session(model, memories, batch_size=1, segment_length=8, documents=[document])
        session.read([piece.tolist()])
        session.close()
        memories.ledger.grow(document, 8)
    asked = numbers.view(8, 8)[5, 2:7]
    found = explain(model, asked, memories, contribution="ablate")
    assert found.passages[0].title == "part 5"
    assert (found.passages[0].contribution or 0) > 0
    assert np.nansum(found.without_memory) > np.nansum(found.losses)


def test_tables_have_a_row_for_each_entry() -> None:
    pandas = pytest.importorskip("pandas")
    found = explained("ours")
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(found) == len(found.to_dicts()) == 11 * 2 * 3 * 5
    assert list(frame) == COLUMNS
    assert "tokens" in str(found)
    assert "<table>" in found._repr_html_()


@KINDS
def test_a_frame_says_what_the_entries_say_and_each_place_is_decoded_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pandas")
    found, asked = explained(kind), list[tuple[int, ...]]()
    text = found.sources.text
    monkeypatch.setattr(found.sources, "text", lambda *place: asked.append(place) or text(*place))
    frame = found.to_pandas()
    assert frame.to_dict("records") == found.to_dicts() == [each._asdict() for each in found]
    assert len(asked) == len(set(asked)) < len(found)


def test_the_best_entries_of_each_token_are_those_with_the_largest_weights() -> None:
    found = explained("ours")
    best = found.to_dicts(of_each_token=3)
    assert len(best) == 3 * len(found.texts)
    assert best == sorted(best, key=lambda each: -each["weight"])
    for token in range(len(found.texts)):
        own = [each for each in best if each["token"] == token]
        assert own == [each._asdict() for each in found.of_token(token, 3)]
    assert found.to_dicts(5, of_each_token=3) == best[:5]
    assert found.to_dicts(of_each_token=10_000) == found.to_dicts()


@pytest.mark.parametrize(
    "text", ["a b", "où שלום 👩\u200d👧 \N{REPLACEMENT CHARACTER}x", "\N{REPLACEMENT CHARACTER}" * 3]
)
def test_the_texts_of_tokens_are_the_text(text: str) -> None:
    found = explained("ours", text)
    assert "".join(found.texts) == text
    assert len(found.texts) == len(text.encode())


def test_what_is_no_text_stays_with_the_tokens_that_wrote_it() -> None:
    model, memories = ours()
    broken = b"a\xff\xfe\xd7"
    found = explain(model, list(broken), memories, tokenizer=ByteTokenizer(), row=1)
    assert "".join(found.texts) == broken.decode("utf-8", "replace")


def test_hostile_sources_are_escaped() -> None:
    model, memories = ours()
    number = memories.ledger.begin("<script>alert(1)</script>", 1, 0)
    with memories.at_batch_indices([1]):
        session = Session(model, memories, batch_size=1, segment_length=16, documents=[number])
        session.read([ByteTokenizer().encode("<img src=x onerror=alert(1)>")])
        session.close()
    memories.ledger.grow(number, 28)
    shown = explain(model, "<img", memories, tokenizer=ByteTokenizer(), row=1)._repr_html_()
    assert "<script>" not in shown
    assert "<img" not in shown


def test_an_explanation_stays_when_its_memory_is_gone() -> None:
    model, memories = ours()
    found = explain(model, "best", memories, tokenizer=ByteTokenizer(), row=1)
    with_titles = [each.text for each in found]
    memories.cleanup()
    assert [each.text for each in found] == with_titles
    with model.knn_memories_context(batch_size=1) as untitled:
        model(torch.tensor([list(range(20))]), untitled)
        found = explain(model, [1, 2], untitled)
    assert len(found) == len(list(found)) > 0


def test_entries_of_unknown_documents_show_their_own_token_alone() -> None:
    """What `generate` reads counts from 0, whichever text it is: neighbours in number are none in any text."""
    torch.manual_seed(0)
    model = MemorizingTransformer(num_tokens=256, dim=24, depth=1, dim_head=8, heads=1, memorizing_layers=1).eval()
    memories = model.create_knn_memories(batch_size=1)
    for letter in b"ab":
        generate(model, [[letter] * 20], memories, max_new_tokens=1, temperature=0)
    found = explain(model, "ab", memories, tokenizer=ByteTokenizer(), contribution="ablate")
    assert {"a", "b"} <= {each.text for each in found}
    assert all(each.text == ByteTokenizer().decode([each.source_token]) for each in found)
    assert found.passages == []
    assert [each["title"] for each in found.by_document()] == ["unknown"]
    written = page(found)
    assert '<bdi class="quote">a</bdi>' in written
    assert '<bdi class="quote">b</bdi>' in written
    with model.knn_memories_context(batch_size=1) as placeless:
        model(torch.tensor([list(b"xyz")]), placeless)
        found = explain(model, "ab", placeless, tokenizer=ByteTokenizer())
    assert {each.text for each in found} == {"x", "y", "z"}


def test_an_empty_memory_explains_that_there_is_nothing() -> None:
    model, memories = ours()
    found = explain(model, [1, 2, 3], memories, row=0)
    assert len(found) == 0
    assert found.passages == []
    assert "0 entries" in str(found)


@pytest.mark.parametrize("nothing", ["cleared", "forgotten", "disabled", "cleared row"])
def test_where_nothing_is_found_there_is_still_a_page_and_a_table(nothing: str) -> None:
    pytest.importorskip("pandas")
    model, memory = attached()
    if nothing == "cleared row":
        memory.clear()
        memory.read(torch.randint(256, (2, 20)), progress=False)
        memory.clear(rows=0)
    elif nothing == "cleared":
        memory.clear()
    elif nothing == "forgotten":
        memory.forget(where=lambda document: True)
    with memory.enabled(nothing != "disabled"):
        found = explain(model, "best", memory, tokenizer=ByteTokenizer())
    assert len(found) == 0
    assert found.mass.shape[2] == 4
    assert "Nothing was looked up." in page(found)
    assert list(found.to_pandas()) == COLUMNS


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_more_tokens_are_explained_than_the_model_has_positions_for(family: str) -> None:
    model, memory = attached(family)
    assert len(explain(model, [1] * 512, memory).texts) == 512
    with pytest.raises(ValueError, match="expected at most 512 tokens, the positions of the model, got 513"):
        explain(model, [1] * 513, memory)


def test_bad_input_is_refused() -> None:
    model, memories = ours()
    for arguments, message in [
        (((), memories), "expected at least one token"),
        (([[]], memories), "expected at least one token"),
        (([[1, 2], [3, 4]], memories), r"expected tokens \(T,\) or \(1, T\) of one text, got \(2, 2\)"),
        (([[1], [2]], memories), r"got \(2, 1\)"),
        (([999], memories), "expected tokens from 0 to 255"),
        (("text", memories), r"expected a tokenizer with encode\(\)"),
        (([1], None), "expected the memories of this model"),
    ]:
        with pytest.raises(ValueError, match=message):
            explain(model, *arguments)
    with pytest.raises(ValueError, match="expected a row from 0 to 1, got 2"):
        explain(model, [1], memories, row=2)
    for sizes in ({"most_passages": -3}, {"around": -5}):
        with pytest.raises(ValueError, match="expected most_passages and around of at least 0"):
            explain(model, [1], memories, **sizes)
    explain(model, [1], memories, row=1, most_passages=0, around=0, contribution="ablate")
    bare = MemorizingTransformer(num_tokens=256, dim=24, depth=1, dim_head=8, heads=1, memorizing_layers=())
    with pytest.raises(ValueError, match="has no layers with a memory"):
        explain(bare, [1], bare.create_knn_memories(batch_size=1))
    with pytest.raises(ValueError, match="expected contribution"):
        explain(model, [1], memories, contribution="guess")
    other, memory = attached()
    with pytest.raises(ValueError, match="expected the memory that is attached to this model"):
        explain(torch.nn.Linear(1, 1), [1], memory)
    assert other is memory.model
