"""What is explained of a memory of passages is what the model does with them: against `generate`, and plain models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.data.tokenizer import ByteTokenizer
from memorizing_transformers_pytorch.explorer import explain
from memorizing_transformers_pytorch.explorer.page import page
from tests.huggingface import spans
from tests.huggingface.families import tiny

WRITE: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TITLES = ["one", "two", "three"]


def remembering(family: str = "llama", texts: int = 3, **options: Any) -> Any:
    """A memory with texts of 40 tokens, each a document."""
    memory = spans.attached(tiny(family), **options)
    for i in range(texts):
        memory.read(spans.tokens(1, 40, seed=i)[0], document=TITLES[i], progress=False)
    return memory


def places(passages: Any) -> set[tuple[int, int]]:
    return {(each.document, at) for each in passages for at in range(each.first, each.last + 1)}


def recalled(memory: Any) -> set[tuple[int, int]]:
    """Documents and positions of what stood before the last call."""
    return {
        (each.document, each.position + i) for each in memory.last_recalled[0] for i in range(len(each.tokens))
    }  # fmt: skip


@pytest.mark.parametrize("content", ["kv", "tokens"])
def test_a_written_text_is_explained_as_generate_has_written_it(content: str) -> None:
    """The losses of what was written, and the passages that stood before each block."""
    memory, prompt, stood = remembering(content=content), spans.tokens(1, 9, seed=7), list[set[tuple[int, int]]]()

    def look(_ids: Any, scores: Any) -> Any:
        stood.append(recalled(memory))
        return scores

    out = memory.model.generate(
        prompt,
        max_new_tokens=11,
        logits_processor=[look],
        output_logits=True,
        return_dict_in_generate=True,
        **WRITE,
    )
    found = explain(memory.model, out.sequences[0], memory, prompt=9)
    losses = F.cross_entropy(torch.cat(out.logits), out.sequences[0, 9:], reduction="none")
    assert np.isnan(found.losses[:9]).all()
    np.testing.assert_allclose(found.losses[9:], losses.numpy(), rtol=1e-3, atol=1e-4)
    assert found.blocks is not None
    assert [(each.first, each.last) for each in found.blocks] == [(9, 12), (13, 16), (17, 19)]
    for block in found.blocks:
        beginning = {(document, at) for document in range(3) for at in range(2)}
        for token in range(block.first - 9, block.last - 8):
            assert places(block.passages) - beginning == stood[token] - beginning


def test_before_the_first_tokens_of_a_text_there_are_no_passages_and_none_looks_ahead() -> None:
    memory, text = remembering(), spans.tokens(1, 14, seed=9)[0]
    found, other = (explain(memory.model, torch.cat((text[:10], text[i:][:2])), memory) for i in (10, 12))
    assert found.blocks is not None
    assert other.blocks is not None
    assert [(each.first, each.last, bool(each.passages)) for each in found.blocks] == [
        (0, 3, False), (4, 7, True), (8, 11, True)
    ]  # fmt: skip
    assert [places(each.passages) for each in found.blocks] == [places(each.passages) for each in other.blocks]
    np.testing.assert_allclose(found.losses[1:10], other.losses[1:10], rtol=1e-4)
    np.testing.assert_allclose(found.losses[1:4], found.without_memory[1:4], rtol=1e-4)


def test_the_attention_on_passages_is_that_of_a_plain_model_on_the_same_text() -> None:
    """Everything is recalled: the text before the prompt."""
    memory, prompt = remembering(texts=1, passages=9), spans.tokens(1, 6, seed=5)
    found = explain(memory.model, prompt[0], memory, prompt=6)
    memory.detach()
    memory.model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = memory.model(torch.cat((spans.tokens(1, 40), prompt), dim=1), output_attentions=True)
    attentions = torch.stack(whole.attentions)[:, 0, :, 40:, :40]
    np.testing.assert_allclose(found.mass, attentions.sum(-1).numpy(), rtol=1e-4, atol=1e-6)
    (passage,) = found.passages
    assert (passage.title, passage.first, passage.last) == ("one", 0, 39)
    assert passage.weight == pytest.approx(found.mass_of_tokens().sum(), rel=1e-4)
    for entry in found:
        assert entry.position == attentions[entry.layer, entry.head, entry.token].argmax()
        assert entry.age == 40 + entry.token - entry.position
        assert entry.source_token == spans.tokens(1, 40)[0, entry.position]


@pytest.mark.parametrize(("family", "content"), [("llama", "kv"), ("llama", "tokens"), ("gpt2", "tokens")])
def test_what_a_passage_is_worth_is_the_loss_without_it(family: str, content: str) -> None:
    """Against a memory that has never read it, where everything is recalled."""
    memory, text = remembering(family, content=content, passages=10), spans.tokens(1, 12, seed=3)[0]
    found = explain(memory.model, text, memory, prompt=9, contribution="ablate")
    worth = {each.title: each.contribution for each in found.passages}
    assert worth.keys() == set(TITLES)
    memory.forget("two")
    left = explain(memory.model, text, memory, prompt=9)
    assert worth["two"] == pytest.approx(np.nansum(left.losses) - np.nansum(found.losses), abs=1e-3)
    assert any(abs(each or 0) > 1e-3 for each in worth.values())


@pytest.mark.parametrize(("family", "content"), [("llama", "kv"), ("llama", "tokens"), ("gpt2", "tokens")])
def test_a_passage_is_taken_away_from_every_block_and_nothing_takes_its_place(family: str, content: str) -> None:
    memory, text = remembering(family, content=content), spans.tokens(1, 20, seed=3)[0]
    found = explain(memory.model, text, memory, contribution="ablate")
    assert found.blocks is not None
    assert len({frozenset(places(each.passages)) for each in found.blocks}) > 1
    assert all(each.contribution is not None and np.isfinite(each.contribution) for each in found.passages)
    assert places(found.passages) == set.union(*(places(each.passages) for each in found.blocks))
    again = explain(memory.model, text, memory)
    np.testing.assert_array_equal(found.losses, again.losses)


def test_explaining_leaves_the_memory_and_the_model_as_they_were() -> None:
    memory, text = remembering(content="kv"), spans.tokens(1, 12)
    before, entries = spans.logits(memory.model, text), list(memory.entries(0, 0))
    settings = [id(each.config) for each in memory.model.modules() if hasattr(each, "config")]
    explain(memory.model, text[0], memory, prompt=5, contribution="ablate")
    assert [id(each.config) for each in memory.model.modules() if hasattr(each, "config")] == settings
    assert torch.equal(spans.logits(memory.model, text), before)
    assert list(memory.entries(0, 0)) == entries


def test_a_model_whose_attention_is_not_known_tells_passages_and_what_they_are_worth() -> None:
    pytest.importorskip("bm25s")
    memory = remembering("bloom", finder="bm25", content="tokens")
    found = explain(memory.model, spans.tokens(1, 12)[0], memory, prompt=9, contribution="ablate")
    assert (found.layers, len(found)) == ([], 0)
    assert found.passages
    assert all(each.contribution is not None for each in found.passages)
    assert found.passages[0].title in page(found)


def test_an_empty_memory_explains_that_no_passages_stood_there() -> None:
    memory = remembering(texts=0)
    found = explain(memory.model, [1, 2, 3, 4, 5, 6], memory, prompt=2, contribution="ablate")
    assert (found.passages, found.mass_of_tokens().tolist()) == ([], [0] * 6)
    np.testing.assert_array_equal(found.losses, found.without_memory)
    assert "No passages stood before the text." in page(found)
    assert "tokens 2-5 came after no passages" in str(found)


def answering(*, template: bool = True, **options: Any) -> Any:
    """A memory of two documents, which can be asked."""
    from memorizing_transformers_pytorch.huggingface.export import for_transformers

    tokenizer: Any = for_transformers(ByteTokenizer())
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}" if template else None
    memory = spans.attached(tiny("llama", vocab_size=256), tokenizer=tokenizer, **options)
    memory.read("The whale was white. Ahab hunted the whale over all the seas. " * 4, document="book", progress=False)
    memory.read("The ship was called Pequod. " * 2, document="ship", progress=False)
    return memory


@pytest.mark.parametrize("template", [True, False])
def test_an_answer_is_explained_by_the_passages_in_its_prompt(template: bool) -> None:
    """A template, or none: then what the model writes after the answer is no part of it."""
    memory = answering(template=template)
    answer = memory.ask("Who?", max_new_tokens=6)
    assert answer.asked is not None
    assert memory.tokenizer.decode(answer.asked.written).strip() == answer.text
    found, prompt = explain(memory.model, answer, memory), answer.asked.prompt
    assert found.blocks is not None
    (block,) = found.blocks
    assert (block.first, block.last) == (len(prompt), len(prompt) + len(answer.asked.written) - 1)
    expected = {(each.position, each.text) for each in answer.sources}
    assert {(each.first, each.text) for each in block.passages} == expected
    again = explain(memory.model, answer.asked, memory)
    np.testing.assert_array_equal(again.losses, found.losses)


def test_the_attention_on_passages_in_a_prompt_is_that_of_the_model() -> None:
    memory = answering()
    answer = memory.ask("Who?", max_new_tokens=4, passages=1)
    found, ids = explain(memory.model, answer, memory), torch.cat((answer.asked.prompt, answer.asked.written))
    ((passage, start),) = answer.asked.placed
    stop = start + len(passage.tokens)
    memory.detach()
    memory.model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = memory.model(ids[None], output_attentions=True)
    attentions = torch.stack(whole.attentions)[:, 0, :, :, start:stop]
    np.testing.assert_allclose(found.mass[..., stop:], attentions[..., stop:, :].sum(-1).numpy(), rtol=1e-4, atol=1e-6)
    assert not found.mass[..., :stop].any()
    for entry in found:
        if entry.token >= stop:
            at = int(attentions[entry.layer, entry.head, entry.token].argmax())
            assert (entry.position, entry.age) == (passage.position + at, entry.token - start - at)
            assert entry.source_token == passage.tokens[at]
    losses = F.cross_entropy(whole.logits[0, :-1], ids[1:], reduction="none")[len(answer.asked.prompt) - 1 :]
    np.testing.assert_allclose(found.losses[len(answer.asked.prompt) :], losses.numpy(), rtol=1e-4)


def test_what_a_passage_in_a_prompt_is_worth_is_the_loss_of_the_prompt_without_its_tokens() -> None:
    memory = answering()
    answer = memory.ask("Who?", max_new_tokens=4, passages=2)
    asked = answer.asked
    found = explain(memory.model, answer, memory, contribution="ablate")

    def loss(gone: Any) -> float:
        shown = torch.ones(len(asked.prompt) + 4, dtype=torch.bool)
        for passage, start in gone:
            shown[start : start + len(passage.tokens)] = False
        ids = torch.cat((asked.prompt, asked.written))[shown]
        with torch.no_grad(), memory.enabled(False):
            logits = memory.model(ids[None]).logits[0]
        return float(F.cross_entropy(logits[-5:-1], ids[-4:], reduction="sum"))

    assert np.nansum(found.losses) == pytest.approx(loss([]), rel=1e-4)
    assert np.nansum(found.without_memory) == pytest.approx(loss(asked.placed), rel=1e-4)
    worth = {(each.document, each.first): each.contribution for each in found.passages}
    for each in asked.placed:
        key = (each.passage.document, each.passage.position)
        if key in worth and len(found.passages) == 2:  # those that overlap are one passage
            assert worth[key] == pytest.approx(loss([each]) - loss([]), abs=1e-3)
    assert len(found.passages) == 2


def test_a_late_answer_of_a_chat_is_explained_with_the_passages_of_earlier_messages() -> None:
    memory = answering()
    chat = memory.chat(passages=1)
    first, second = (chat.say(text, max_new_tokens=3) for text in ("What was the ship called?", "Who hunted?"))
    found = explain(memory.model, second, memory)
    sources = [each for answer in (first, second) for each in answer.sources]
    expected = {(each.document, each.position + i) for each in sources for i in range(len(each.tokens))}
    assert places(found.passages) == expected
    assert len(second.asked.placed) == 2


def test_an_answer_beyond_a_window_is_explained_by_what_stood_before_it() -> None:
    memory = answering(passages=1, write="window", window=60)
    answer = memory.ask("Who?", max_new_tokens=3)
    assert answer.asked.placed is None
    found = explain(memory.model, answer, memory)
    assert {(each.document, each.first) for each in found.passages} == {
        (each.document, each.position) for each in answer.sources
    }


def test_what_cannot_be_explained_is_refused() -> None:
    memory = remembering()
    for options, message in (
        ({"prompt": 4}, "the prompt has 0 to 3 of the tokens, got prompt=4"),
        ({"prompt": -1}, "the prompt has 0 to 3 of the tokens"),
        ({"question": "Who?"}, "text needs a tokenizer"),
        ({"row": 1}, "expected a row from 0 to 0, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(memory.model, [1, 2, 3], memory, **options)
    with pytest.raises(ValueError, match="expected at most 486 tokens"):
        explain(memory.model, [1] * 487, memory)
    with pytest.raises(ValueError, match="last_recalled tells its passages"):
        _ = memory.last_retrieved
    from tests.explorer.test_explain import attached

    model, of_tokens = attached()
    with pytest.raises(ValueError, match="a question finds passages"):
        explain(model, [1, 2, 3], of_tokens, question=[1])
