"""Questions, answers with their sources, and chats."""

from __future__ import annotations

import gc
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from memorizing_transformers_pytorch.data.tokenizer import ByteTokenizer
from memorizing_transformers_pytorch.huggingface import Answer, Excerpt, RecallMemory, attach_memory
from memorizing_transformers_pytorch.huggingface.asking import THREAD
from memorizing_transformers_pytorch.huggingface.attach_spans import Head
from memorizing_transformers_pytorch.huggingface.export import for_transformers
from memorizing_transformers_pytorch.huggingface.prompts import Turn, prompt_of
from tests.huggingface.families import tiny

BOOK = "The whale was white. Ahab hunted the whale over all the seas. " * 8
FACT = "The password of the vault is seven green apples."
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)


@pytest.fixture(params=["llama", "gpt2"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = "memorizing_transformers_pytorch.huggingface.attach_spans.best_head"
    monkeypatch.setattr(name, lambda *_: Head(0, 0, 1.0))
    tokenizer: Any = for_transformers(ByteTokenizer())
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    options = {"chunk": 64, "overlap": 16, "span": 24, "passages": 2, "every": 8}
    made = attach_memory(tiny(request.param, vocab_size=256), retrieve="spans", tokenizer=tokenizer, **options)
    made.read(BOOK, document="book", progress=False)
    made.read(FACT, document="vault", progress=False)
    return made


def writing() -> bool:
    return any(each.name == THREAD for each in threading.enumerate())


def plain(memory: RecallMemory, prompt: str, count: int) -> str:
    """What the model writes without a memory."""
    tokens = torch.tensor(list(prompt.encode()))[None]
    with memory.enabled(False):
        done = memory.model.generate(tokens, max_new_tokens=count, do_sample=False, attention_mask=tokens * 0 + 1)
    return str(memory.tokenizer.decode(done[0, tokens.shape[1] :])).strip()


def with_text(memory: RecallMemory, question: str, content: str) -> str:
    """A message with the passages of a question, the best one last."""
    texts = [str(each.text) for each in memory.recall(question, passages=4)]
    return "Text:\n" + "\n...\n".join(texts[::-1]) + "\n\n" + content


def asked(question: str) -> str:
    return f"Question: {question}\nAnswer from the text, in a few words."


def test_an_answer_is_that_of_the_template_with_the_passages_of_the_question(memory: RecallMemory) -> None:
    question = "What is the password of the vault?"
    answer = memory.ask(question, max_new_tokens=12)
    assert isinstance(answer, Answer)
    prompt = f"<user>{with_text(memory, question, asked(question))}</><assistant>"
    assert answer.text == plain(memory, prompt, 12)
    found = memory.recall(question, passages=4)
    assert len(found) == 4
    assert [(each.title, each.position, each.score) for each in answer.sources] == [
        (each.title, each.position, each.score) for each in found
    ]
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)


def test_an_answer_tells_what_the_model_was_given(memory: RecallMemory) -> None:
    """Passages keep the tokens that were read, and are found at their places."""
    question = "What is the password of the vault?"
    answer, before = memory.ask(question, max_new_tokens=4), memory.asked(question)
    assert answer.asked is not None
    expected = f"<user>{with_text(memory, question, asked(question))}</><assistant>"
    assert memory.tokenizer.decode(answer.asked.prompt) == expected
    assert torch.equal(before.prompt, answer.asked.prompt)
    assert (len(before.written), before.question.tolist()) == (0, list(question.encode()))
    assert answer.asked.placed is not None
    assert [each.passage.position for each in answer.asked.placed] == [e.position for e in answer.sources[::-1]]
    for passage, start in answer.asked.placed:
        assert torch.equal(answer.asked.prompt[start : start + len(passage.tokens)], passage.tokens)
    with memory.enabled(False):
        alone = memory.asked(question)
    assert (memory.tokenizer.decode(alone.prompt), alone.placed) == (f"<user>{asked(question)}</><assistant>", [])


def test_a_plain_prompt_begins_as_a_text_does() -> None:
    """Special tokens come first, and nowhere else."""

    def tokenizer(text: str, *, add_special_tokens: bool = True, verbose: bool = False) -> Any:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + list(text.encode()))

    found = Excerpt(0, "", 0, "abc", 1.0, torch.tensor([7, 8, 9]))
    prompt, ((passage, start),) = prompt_of([Turn("user", "Who?", [found])], tokenizer)
    before, after = b"Text:\n", b"\n\nQuestion: Who?\nAnswer:"
    assert prompt.tolist() == [1, *before, 7, 8, 9, *after]
    assert (passage, start) == (found, 1 + len(before))


def test_nothing_is_stored_or_recalled_beside_the_passages_of_the_prompt(memory: RecallMemory) -> None:
    """Model calls of a question see the prompt alone."""
    lengths = list[int]()
    memory.model.get_input_embeddings().register_forward_hook(lambda _m, ids, _out: lengths.append(ids[0].shape[-1]))
    before = [each.tokens for each in memory.documents()]
    answer = memory.ask("Who hunted the whale?", max_new_tokens=12)
    assert answer.asked is not None
    assert lengths[1:] == [len(answer.asked.prompt)] + [1] * 11  # the first call is that of the finder
    assert [each.tokens for each in memory.documents()] == before


def test_a_system_message_comes_first_and_models_without_template_get_a_plain_prompt(memory: RecallMemory) -> None:
    answer = memory.ask("Who?", system="Be short.", max_new_tokens=5)
    user = with_text(memory, "Who?", asked("Who?"))
    assert answer.text == plain(memory, f"<system>Be short.</><user>{user}</><assistant>", 5)
    memory.tokenizer.chat_template = None
    answer = memory.ask("Who?", system="Be short.", max_new_tokens=5)
    user = with_text(memory, "Who?", "Question: Who?")
    assert answer.text == plain(memory, f"Be short.\n{user}\nAnswer:", 5)


def test_without_a_template_the_answer_ends_before_another_question(
    memory: RecallMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.tokenizer.chat_template = None
    written = iter([*b" A whale.\nQuestion: And?"])

    def forced(_tokens: Any, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([next(written)]), 0.0)

    monkeypatch.setattr(memory.model, "_get_logits_processor", lambda *_, **__: forced)
    stream = memory.ask("Who?", stream=True)
    assert ("".join(stream).strip(), stream.text) == ("A whale.", "A whale.")
    assert bytes(written) == b" And?"


def test_a_stream_gives_the_same_answer_piece_by_piece(memory: RecallMemory) -> None:
    expected = memory.ask("Who hunted?", max_new_tokens=30)
    stream = memory.ask("Who hunted?", max_new_tokens=30, stream=True)
    pieces = list(stream)
    assert "".join(pieces).strip() == stream.text == expected.text
    assert str(stream) == str(expected)
    assert not writing()


def test_sources_wait_for_the_end_of_a_stream_that_nobody_has_iterated(memory: RecallMemory) -> None:
    assert memory.ask("Who?", max_new_tokens=4, stream=True).sources[0].title in ("book", "vault")


def test_a_generation_that_fails_raises_in_the_caller(memory: RecallMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise FloatingPointError("no more")

    monkeypatch.setattr(memory.model.get_output_embeddings(), "forward", broken)
    for use in (list, lambda stream: stream.sources, lambda stream: stream.text):
        stream = memory.ask("Who?", stream=True)
        with pytest.raises(FloatingPointError, match="no more"):
            use(stream)
        assert not writing()
    with pytest.raises(FloatingPointError, match="no more"):
        memory.ask("Who?")


def test_a_stream_that_is_closed_or_forgotten_stops_writing(memory: RecallMemory) -> None:
    config = GenerationConfig(max_new_tokens=400, eos_token_id=None)
    stream = memory.ask("Who?", stream=True, generation_config=config)
    stream.close()
    assert not writing()
    assert len(stream.text) < 400
    stream = memory.ask("Who?", stream=True, generation_config=config)
    next(stream)
    del stream
    gc.collect()
    before = time.monotonic()
    while writing():
        assert time.monotonic() - before < 5
        time.sleep(0.01)


def test_a_stream_sees_the_scopes_of_the_thread_that_asked(memory: RecallMemory) -> None:
    with memory.enabled(False):
        stream = memory.ask("Who?", stream=True, max_new_tokens=3)
    assert stream.sources == []
    with memory.enabled(False):
        assert memory.ask("Who?", max_new_tokens=3).text == stream.text


def test_streams_of_several_questions_keep_their_sources_apart(memory: RecallMemory) -> None:
    questions = ["Who hunted the whale?", "What is the password of the vault?", "seven green apples"]
    expected = [str(memory.ask(question, max_new_tokens=8)) for question in questions]
    streams = [memory.ask(question, max_new_tokens=8, stream=True) for question in questions]
    assert [str(stream) for stream in streams] == expected


def test_sampling_and_beams_go_through_the_generation_config(memory: RecallMemory) -> None:
    for config in (GenerationConfig(num_beams=2, max_new_tokens=4), GenerationConfig(do_sample=True, max_new_tokens=4)):
        chat = memory.chat()
        for _ in range(2):
            assert len(chat.say("Who?", generation_config=config).text) <= 4
        assert config.return_dict_in_generate is not True
    with pytest.raises(ValueError, match="beam"):
        memory.ask("Who?", stream=True, generation_config=GenerationConfig(num_beams=2, max_new_tokens=4)).text  # noqa: B018


def test_a_chat_goes_on_with_its_cache_and_finds_by_each_message(
    memory: RecallMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Who hunted the whale?", "What is the password of the vault?"]
    chat, calls = memory.chat(system="Be kind."), []
    inner = memory.model.get_input_embeddings()
    inner.register_forward_hook(lambda _module, inputs, _out: calls.append(inputs[0].shape[-1]))
    first = chat.say(texts[0], max_new_tokens=6)
    calls.clear()
    second = chat.say(texts[1], max_new_tokens=6)
    users = [f"<user>{with_text(memory, text, text)}</><assistant>" for text in texts]
    assert len(users[1]) <= max(calls) <= len(users[1]) + 20  # what was said before was not read again
    assert second.text == plain(memory, f"<system>Be kind.</>{users[0]}{first.text}</>{users[1]}", 6)
    roles = ["system", "user", "assistant", "user", "assistant"]
    said = ["Be kind.", texts[0], first.text, texts[1], second.text]
    assert chat.messages == [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    assert [each.position for each in second.sources] == [each.position for each in memory.recall(texts[1], passages=4)]


def test_with_nothing_read_a_chat_is_that_of_the_plain_model(memory: RecallMemory) -> None:
    memory.clear()
    chat = memory.chat()
    answers = [chat.say(text, max_new_tokens=6) for text in ("Who?", "Why?", "When?")]
    assert [each.sources for each in answers] == [[], [], []]
    prompt = "".join(f"<user>{q}</><assistant>{a.text}</>" for q, a in zip(("Who?", "Why?"), answers, strict=False))
    assert answers[-1].text == plain(memory, f"{prompt}<user>When?</><assistant>", 6)


def test_a_message_that_fails_counts_as_not_said(memory: RecallMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, other = memory.chat(), memory.chat()
    for each in (chat, other):
        each.say("Who?", max_new_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(memory.model.get_output_embeddings(), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat.say("Why?", max_new_tokens=4)
    assert len(chat.messages) == 2
    assert chat.say("When?", max_new_tokens=4).text == other.say("When?", max_new_tokens=4).text


def test_a_chat_is_not_asked_while_it_writes(memory: RecallMemory) -> None:
    chat = memory.chat()
    stream = chat.say("Who?", stream=True, generation_config=GenerationConfig(max_new_tokens=300, eos_token_id=None))
    with pytest.raises(ValueError, match="still being written"):
        chat.say("Why?")
    stream.close()
    assert chat.say("Why?", max_new_tokens=2).sources


def test_rows_are_asked_one_at_a_time(memory: RecallMemory) -> None:
    memory.clear()
    padded = memory.tokenizer([BOOK[:60], FACT[:60] + " " * 12])
    memory.read(padded, document=["book", "vault"], progress=False)
    for row, title in enumerate(("book", "vault")):
        answer = memory.ask("Who?", row=row, max_new_tokens=2)
        assert {each.title for each in answer.sources} == {title}
        assert answer.asked is not None
        assert torch.equal(memory.asked("Who?", row=row).prompt, answer.asked.prompt)


def test_questions_that_cannot_be_asked_are_refused(memory: RecallMemory) -> None:
    for options, message in (({"question": ""}, "no tokens"), ({"question": "Who?", "row": 2}, "rows 0 to 0")):
        for stream in (False, True):
            with pytest.raises(ValueError, match=message):
                memory.ask(**options, stream=stream)  # type: ignore[call-overload]
    memory.tokenizer = None
    with pytest.raises(ValueError, match="the memory needs a tokenizer"):
        memory.ask("Who?")
    memory.detach()
    with pytest.raises(ValueError, match="detach"):
        memory.ask("Who?")


def test_as_many_passages_are_given_as_are_asked_for(memory: RecallMemory) -> None:
    for count in (1, 3):
        assert len(memory.ask("Who?", passages=count, max_new_tokens=2).sources) == count
        placed = memory.asked("Who?", passages=count).placed
        assert placed is not None
        assert len(placed) == count
        assert len(memory.chat(passages=count).say("Who?", max_new_tokens=2).sources) == count
    for ask in (memory.ask, memory.asked):
        with pytest.raises(ValueError, match="passages must be at least 1"):
            ask("Who?", passages=0)
    with pytest.raises(ValueError, match="passages must be at least 1"):
        memory.chat(passages=0)


def test_an_answer_prints_its_sources(memory: RecallMemory) -> None:
    text, *sources = str(memory.ask("Who hunted?", max_new_tokens=3)).splitlines()
    assert all(line.startswith(f"[{i}] ") and ", token " in line for i, line in enumerate(sources, 1))
    assert sources
    assert text is not None


def test_a_chat_goes_on_beyond_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves the cache enters the memory, and is among the sources."""
    name = "memorizing_transformers_pytorch.huggingface.attach_spans.best_head"
    monkeypatch.setattr(name, lambda *_: Head(0, 0, 1.0))
    options = {"chunk": 64, "overlap": 16, "span": 24, "passages": 2, "write": "window", "window": 60}
    tokenizer: Any = for_transformers(ByteTokenizer())
    tokenizer.chat_template = TEMPLATE
    memory = attach_memory(tiny("llama", vocab_size=256), retrieve="spans", tokenizer=tokenizer, **options)
    chat = memory.chat()  # type: ignore[attr-defined]
    for _ in range(5):
        answer = chat.say("The whale was white, was it not?", max_new_tokens=4)
    assert {each.title for each in answer.sources} == {"document 0"}
    assert memory.documents()[0].tokens > 60
