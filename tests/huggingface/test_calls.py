"""What a call of a model finds and brings is its own: other threads and a backward pass that comes later find the same.
Calls that are refused or fail change nothing."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from transformers import DynamicCache

from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory
from tests.huggingface.families import tiny
from tests.huggingface.test_attach import EVERYTHING, logits, tokens

WRITING: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


def together(*works: Callable[[], Any]) -> list[Any]:
    """What these give, each in a thread of its own; what one raises is raised."""
    found: list[Any] = [None] * len(works)

    def work(i: int) -> None:
        try:
            found[i] = works[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def keys(memory: AttachedMemory) -> list[Tensor]:
    """All keys of all layers, the oldest first."""
    parts = [part for layer in memory.layers.values() for part in layer.memories]
    return [part.store.oldest(row, count).keys.floats() for part in parts for row, count in enumerate(part.num_entries)]


def answers(model: Any, prompts: Iterable[Tensor], count: int = 6) -> list[list[int]]:
    return [model.generate(prompt, max_new_tokens=count, **WRITING)[0].tolist() for prompt in prompts]


@pytest.mark.parametrize("options", [{}, {"recent": 16}], ids=str)
def test_threads_that_read_get_the_answers_of_one_after_the_other(options: dict[str, Any]) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", layers="all", topk=4, index="exact", **options)
    memory.read(tokens(1, 100), progress=False)
    prompts = [[tokens(1, 5 + row, seed=10 * row + i) for i in range(4)] for row in range(3)]
    alone = [answers(memory.model, some) for some in prompts]
    assert together(*(lambda some=some: answers(memory.model, some) for some in prompts)) == alone  # type: ignore[misc]


@pytest.mark.parametrize("chunk", [8, 32])
def test_what_is_read_is_what_is_read_in_silence_while_others_generate(chunk: int) -> None:
    def remembered(busy: bool) -> list[Tensor]:
        memory = attach_memory(
            tiny("llama"), retrieve="tokens", layers="all", topk=4, chunk=chunk, index="exact", recent=40
        )
        done = threading.Event()

        def read() -> None:
            try:
                memory.read(tokens(1, 200), document="book", progress=False)
            finally:
                done.set()

        def chat() -> None:
            while not done.is_set():
                answers(memory.model, [tokens(1, 9, seed=1)], 1)

        together(*([read, chat, chat] if busy else [read]))
        assert [(each.title, each.tokens) for each in memory.documents()] == [("book", 200)]
        return keys(memory)

    for quiet, busy in zip(remembered(False), remembered(True), strict=True):
        assert torch.equal(quiet, busy)


def test_threads_that_write_do_so_one_after_the_other() -> None:
    """Keys of the first layer depend on nothing but token and place: no entry has the key of another."""
    options = {**EVERYTHING, "layers": [0], "max_memories": 1_000, "recent": 1_000}
    memory, text = attach_memory(tiny("llama"), retrieve="tokens", **options, chunk=8), tokens(1, 9, seed=9)

    def read(seed: int) -> None:
        for _ in range(3):
            memory.read(tokens(1, 24, seed=seed), progress=False)

    def train() -> None:
        for _ in range(3):
            with memory.writing():
                memory.model(input_ids=text, labels=text).loss.backward()

    def chat() -> None:
        for _ in range(6):
            assert logits(memory.model, text).isfinite().all()
            assert all(each.shape[-1] == 3 for each in memory.last_retrieved.values())

    together(lambda: read(1), lambda: read(2), train, chat)
    found = list(memory.entries(0, 0))
    assert [entry.position for entry in found] == list(range(6 * 24 + 3 * 9))
    quiet = attach_memory(tiny("llama"), retrieve="tokens", **options)
    quiet.read(torch.tensor([entry.token for entry in found]), progress=False)
    torch.testing.assert_close(keys(memory), keys(quiet), rtol=1e-3, atol=1e-3)


def test_switches_are_those_of_the_thread_that_set_them() -> None:
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING), tokens(1, 9)
    plain = logits(memory.model, ids)
    memory.read(tokens(1, 30, seed=1), progress=False)
    with_memory = logits(memory.model, ids)
    with memory.enabled(False), memory.read_only():
        assert torch.equal(logits(memory.model, ids), plain)
        (found,) = together(lambda: logits(memory.model, ids))
        assert torch.equal(found, with_memory)
        context = contextvars.copy_context()
        (found,) = together(lambda: context.run(logits, memory.model, ids))
        assert torch.equal(found, plain)
        together(lambda: memory.read(ids, progress=False))
    assert len(memory.documents()) == 2


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_layer_that_runs_again_in_the_backward_pass_finds_what_it_found(reentrant: bool | None) -> None:
    """Whatever the memory has become: cleared, read anew, its switches set otherwise."""

    def gradients(checkpointing: bool | None) -> list[Tensor]:
        model, ids = tiny("llama", num_hidden_layers=3).train(), tokens(2, 9)
        memory = attach_memory(model, retrieve="tokens", layers=[0, 1], topk=4, index="exact", recent=16)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        loss = torch.zeros(())
        for seed, on in ((1, True), (2, True), (3, False)):
            memory.clear()
            memory.read(tokens(1, 40, seed=seed), progress=False)
            with memory.enabled(on):
                loss = loss + seed * model(input_ids=ids, labels=ids, use_cache=False).loss
        memory.forget(memory.documents()[0].number)
        loss.backward()
        memory.detach()
        if checkpointing is not None:  # nothing is left behind
            functions = [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()]
            assert not any("memorizing" in type(function).__module__ for function in functions)
        return [each.grad for each in model.parameters() if each.grad is not None]

    torch.testing.assert_close(gradients(reentrant), gradients(None), rtol=1e-6, atol=1e-6)


def test_a_layer_that_runs_again_for_an_unknown_call_is_refused() -> None:
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING), tokens(1, 9)
    memory.read(tokens(1, 30, seed=1), progress=False)
    embedded = memory.model.get_input_embeddings()(ids)

    def whole(inputs: Tensor) -> Tensor:
        out: Tensor = memory.model(inputs_embeds=inputs).logits
        return out

    with pytest.raises(ValueError, match=r"use model\.gradient_checkpointing_enable"):
        checkpoint(whole, embedded, use_reentrant=False).sum().backward()
    layer = memory.model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *inputs, **options: checkpoint(forward, *inputs, use_reentrant=False, **options)
    with pytest.raises(ValueError, match=r"use model\.gradient_checkpointing_enable"):
        memory.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    positions = memory.model.model.rotary_emb(embedded, torch.arange(9)[None])
    with pytest.raises(ValueError, match="outside of a call of its model"):
        memory.model.model.layers[0].self_attn(embedded, position_embeddings=positions, attention_mask=None)


@pytest.mark.parametrize("options", [{}, {"positions": "constant"}, {"recent": 10}], ids=str)
@pytest.mark.parametrize("inside", ["attach", "read", "generate", "load", "all"])
def test_a_model_can_be_trained_after_inference_mode(inside: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, ids = tiny("llama"), tokens(1, 9)

    def mode(step: str) -> torch.inference_mode:
        return torch.inference_mode(inside in (step, "all"))

    with mode("attach"):
        memory = attach_memory(model, retrieve="tokens", layers=[1], topk=4, chunk=16, **options)
    with mode("read"):
        memory.read(tokens(2, 40), progress=False)
    with mode("load"):
        memory.save(tmp_path / "memory")
        memory.load(tmp_path / "memory")
    with mode("generate"):
        model.generate(tokens(2, 5), max_new_tokens=3, **WRITING)
    model.train()
    with memory.writing():
        model(input_ids=tokens(2, 9), labels=tokens(2, 9), use_cache=False).loss.backward()
    assert all(each.grad is not None for each in memory.parameters())
    memory.read(ids.expand(2, -1), progress=False)


def picture(memory: AttachedMemory) -> Any:
    """All that there is to see of a memory."""
    entries = {
        (layer, row): list(memory.entries(row, layer)) for layer in memory.layers for row in range(memory.num_rows)
    }
    places = [memory.place_of(row) for row in range(memory.num_rows)]
    return memory.documents(), entries, places, memory.ledger.next_number


def refusals(memory: AttachedMemory, folder: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Calls that a memory of two rows refuses."""
    model, ids = memory.model, tokens(2, 9)

    def written(*calls: Any, titles: Any = None, **options: Any) -> None:
        with memory.writing(titles):
            for each in calls:
                logits(model, each, **options)

    def inside(what: Callable[[], Any]) -> None:
        with memory.read_only():
            what()

    def inside_writing(what: Callable[[], Any]) -> None:
        with memory.writing():
            what()

    elsewhere = folder / "another"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "file").write_text("of somebody else")
    fresh = {"past_key_values": DynamicCache(config=model.config)}
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)}
    return [
        ("beams", lambda: model.generate(ids[:1], num_beams=2, max_new_tokens=3, **WRITING)),
        ("beams of rows", lambda: model.generate(ids, num_beams=2, max_new_tokens=3, **WRITING)),
        ("a batch of others", lambda: logits(model, tokens(3, 9))),
        ("a batch of others with a cache", lambda: logits(model, tokens(3, 9), **fresh)),
        ("another text", lambda: memory.read(tokens(3, 9), progress=False)),
        ("titles", lambda: memory.read(ids, document=["one"], progress=False)),
        ("token ids", lambda: memory.read(ids + 90, progress=False)),
        ("empty", lambda: memory.read(ids, torch.zeros_like(ids), progress=False)),
        ("scores of others", lambda: memory.score(tokens(3, 9), progress=False)),
        ("a document to go on with", lambda: memory.go_on(0, ids[0], progress=False)),
        ("read-only", lambda: inside(lambda: memory.read(ids, progress=False))),
        ("read-only writing", lambda: inside(lambda: written(ids))),
        ("read-only merge", lambda: inside(lambda: memory.merge(folder / "saved"))),
        ("writing of others", lambda: written(tokens(3, 9))),
        ("two calls", lambda: written(ids, ids)),
        ("titles of a segment", lambda: written(ids, titles=["one"])),
        ("packed documents", lambda: written(ids, **packed)),
        ("packed documents in a chat", lambda: logits(model, ids, **packed, **fresh)),
        ("reading inside writing", lambda: inside_writing(lambda: memory.read(ids, progress=False))),
        ("loading inside writing", lambda: inside_writing(lambda: memory.load(folder / "saved"))),
        ("nothing there", lambda: memory.load(folder / "missing")),
        ("nothing to merge", lambda: memory.merge(folder / "missing")),
        ("fewer rows to merge", lambda: memory.merge(folder / "one row")),
        ("a folder of others", lambda: memory.save(elsewhere)),
        ("a memory of others", lambda: memory.save(folder / "one row")),
        ("an unknown document", lambda: memory.forget("unknown")),
        ("no document", lambda: memory.forget()),
        ("an unknown row", lambda: memory.clear([2])),
        ("an unknown index", lambda: memory.search_with("nonsense")),
        ("parameters", lambda: memory.load_parameters(folder / "missing")),
    ]


@pytest.mark.parametrize("options", [{}, {"write": "window", "window": 5}], ids=["read", "window"])
@pytest.mark.parametrize("talking", [False, True], ids=["", "talking"])
def test_a_refused_call_changes_nothing(options: dict[str, Any], talking: bool, tmp_path: Path) -> None:
    other = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING, **options)
    other.read(tokens(1, 9), progress=False)
    other.save(tmp_path / "one row")
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING, **options)
    memory.read(tokens(2, 20), document=["one", "two"], progress=False)
    memory.save(tmp_path / "saved")
    cache = DynamicCache(config=memory.model.config)
    if talking:
        logits(memory.model, tokens(2, 9), past_key_values=cache)
    before, seen = picture(memory), cache.get_seq_length()
    for name, call in refusals(memory, tmp_path):
        if not options and name in ("beams", "beams of rows", "packed documents in a chat"):
            continue  # a memory that is only read serves these
        with pytest.raises(ValueError):  # noqa: PT011 - each has a message of its own
            call()
        assert picture(memory) == before, name
    assert cache.get_seq_length() == seen
    if talking:
        logits(memory.model, tokens(2, 1), past_key_values=cache)  # the chat goes on


@pytest.mark.parametrize("options", [{}, {"write": "window", "window": 5}], ids=["read", "window"])
def test_a_refused_call_leaves_an_empty_memory_empty(options: dict[str, Any]) -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING, **options)
    before, model, ids = picture(memory), memory.model, tokens(2, 9)
    bad: list[Callable[[], Any]] = [lambda: memory.read(ids, document=["one"], progress=False)]
    if options:
        bad.append(lambda: model.generate(ids, num_beams=2, max_new_tokens=3, **WRITING))
        bad.append(lambda: model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=3, **WRITING))
        bad.append(lambda: model.generate(ids, cache_implementation="static", max_new_tokens=3, **WRITING))
    for call in bad:
        with pytest.raises(ValueError):  # noqa: PT011 - each has a message of its own
            call()
        assert picture(memory) == before
        assert memory.num_rows == 1
    with memory.read_only():
        assert len(memory.score(ids, progress=False)) == 2
    assert picture(memory) == before
    assert memory.num_rows == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("options", [{}, {"write": "window", "window": 5}], ids=["read", "window"])
def test_a_call_that_fails_amidst_changes_nothing(error: type[BaseException], options: dict[str, Any]) -> None:
    memory, ids = attach_memory(tiny("llama"), retrieve="tokens", **EVERYTHING, **options), tokens(2, 9)
    model = memory.model

    def fail(*_: Any) -> None:
        raise error

    def written() -> None:
        with memory.writing():
            logits(model, ids)

    calls: list[Callable[[], Any]] = [
        lambda: memory.read(ids, progress=False),
        lambda: memory.score(ids, progress=False),
        lambda: model.generate(ids, max_new_tokens=3, **WRITING),
        lambda: logits(model, ids, past_key_values=DynamicCache(config=model.config)),
        written,
    ]
    for remembers in (False, True):
        if remembers:
            memory.read(tokens(2, 20), progress=False)
        before, expected = picture(memory), logits(model, ids)
        for call in calls:
            hook = model.model.layers[1].mlp.register_forward_hook(fail)
            with pytest.raises(error):
                call()
            hook.remove()
            assert picture(memory) == before
            assert torch.equal(logits(model, ids), expected)
        together(lambda: memory.documents())
        memory.clear()
