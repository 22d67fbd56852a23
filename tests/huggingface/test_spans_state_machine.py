"""Whatever is read, forgotten, cleared, saved, loaded and merged: what is recalled is what a plain list holds."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

pytest.importorskip("transformers")

from transformers import DynamicCache

from memorizing_transformers_pytorch.memory import KNNMemoryList
from tests.amounts import some
from tests.huggingface.families import tiny
from tests.huggingface.spans import NOTHING_ELSE, attached, logits, read, recalled, tokens

CAPACITY = 70


class Entry(NamedTuple):
    document: int
    place: int
    token: int


class Plain(NamedTuple):
    """Entries in the order in which they were read, how far the row is, and the number of the next document."""

    entries: list[Entry]
    place: int
    next_number: int


class Spans(RuleBasedStateMachine):
    """One row, which fills, and a chat that goes on all the while."""

    content = "kv"

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model = tiny("llama", "sdpa")
        self.memory = attached(self.model, content=self.content, max_memories=CAPACITY, chunk=16, overlap=3)
        self.plain, self.saved, self.seed = Plain([], 0, 0), Plain([], 0, 0), 0
        self.cache, self.written = DynamicCache(), 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(count=st.sampled_from([1, 2, 15, 16, 17, 30, 50]), look_up=st.booleans())
    def read(self, count: int, look_up: bool) -> None:
        self.seed += 1
        ids, (entries, place, number) = tokens(1, count, seed=self.seed)[0], self.plain
        self.memory.read(ids, progress=False, look_up=look_up)
        new = [Entry(number, place + i, int(ids[i])) for i in range(count)]
        self.plain = Plain((entries + new)[-CAPACITY:], place + count, number + 1)

    @precondition(lambda self: self.plain.entries)
    @rule(chosen=st.integers(0, 1_000))
    def forget(self, chosen: int) -> None:
        held = sorted({entry.document for entry in self.plain.entries})
        gone = held[chosen % len(held)]
        self.memory.forget(gone)
        self.plain = self.plain._replace(entries=[entry for entry in self.plain.entries if entry.document != gone])

    @rule()
    def clear(self) -> None:
        self.memory.clear()
        self.plain = self.plain._replace(entries=[], place=0)

    @rule()
    def save(self) -> None:
        self.memory.save(self.folder / "memory", overwrite=True)
        self.saved = self.plain

    @precondition(lambda self: self.saved.next_number)
    @rule(mmap=st.booleans())
    def load(self, mmap: bool) -> None:
        self.memory.load(self.folder / "memory", mmap=mmap)
        self.plain = self.saved

    @precondition(lambda self: self.saved.next_number)
    @rule()
    def merge(self) -> None:
        other = self.folder / "other"
        KNNMemoryList.load(self.folder / "memory").save(other, overwrite=True)
        self.memory.merge(other)
        (entries, place, number), more = self.plain, self.saved
        moved = [Entry(each.document + number, each.place + place, each.token) for each in more.entries]
        self.plain = Plain((entries + moved)[-CAPACITY:], place + more.place, number + more.next_number)

    @rule(seed=st.integers(0, 50), count=st.integers(1, 8))
    def ask(self, seed: int, count: int) -> None:
        for passage in self.memory.recall(tokens(1, count, seed=seed)[0], passages=3):
            places = [entry for entry in self.plain.entries if entry.document == passage.document]
            held = {entry.place: entry.token for entry in places}
            start = self.memory.ledger[passage.document].start + passage.position
            assert [held[start + i] for i in range(len(passage.tokens))] == passage.tokens.tolist()

    @rule(seed=st.integers(0, 50), count=st.integers(2, 8))
    def chat(self, seed: int, count: int) -> None:
        self.memory._at_work.last_recalled = []
        found = logits(self.model, tokens(1, count, seed=seed), past_key_values=self.cache)
        self.written += count
        assert found.isfinite().all()
        assert self.cache.get_seq_length() == self.written
        self.what_was_recalled_is_held()

    @rule(seed=st.integers(0, 50), count=st.integers(1, 8))
    def prompt(self, seed: int, count: int) -> None:
        self.memory._at_work.last_recalled = []
        logits(self.model, tokens(1, count, seed=seed))
        self.what_was_recalled_is_held()

    def what_was_recalled_is_held(self) -> None:
        if not self.memory.last_recalled:
            assert not self.plain.entries
            return
        origins = [Entry(*each) for each in recalled(self.memory).tolist()]
        assert len(origins) == min(len(self.plain.entries), self.memory.options.budget)
        assert set(origins) <= set(self.plain.entries)
        places = [self.plain.entries.index(each) for each in origins]
        assert places == sorted(set(places))
        passages = self.memory.last_recalled[0]
        assert sum(len(each.tokens) for each in passages) == len(origins)
        stop = 0
        for each in passages:
            start, stop = stop, stop + len(each.tokens)
            own = origins[start:stop]
            assert {entry.document for entry in own} == {each.document}
            assert [entry.place for entry in own] == list(range(own[0].place, own[0].place + len(own)))
            assert [entry.token for entry in own] == each.tokens.tolist()

    @invariant()
    def holds_what_the_list_does(self) -> None:
        for layer in self.memory.layers:
            assert list(map(tuple, self.memory.entries(0, layer))) == [tuple(entry) for entry in self.plain.entries]
        counts = {document.number: document.entries for document in self.memory.documents() if any(document.entries)}
        numbers, layers = [entry.document for entry in self.plain.entries], len(self.memory.layers)
        assert counts == {number: (numbers.count(number),) * layers for number in set(numbers)}
        assert self.memory.place_of(0) == self.plain.place


class SpansOfTokens(Spans):
    content = "tokens"


TestSpans, TestSpansOfTokens = Spans.TestCase, SpansOfTokens.TestCase
TestSpans.settings = settings(max_examples=some(5, 200), stateful_step_count=20, deadline=None)
TestSpansOfTokens.settings = TestSpans.settings


def in_threads(*works: Any) -> list[BaseException]:
    failed: list[BaseException] = []

    def run(work: Any) -> None:
        try:
            work()
        except BaseException as error:  # to be shown by the thread of the test
            failed.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return failed


def test_threads_write_what_each_would_alone() -> None:
    model = tiny("llama", "sdpa")
    memory = read(attached(model, every=3), tokens(1, 200))
    prompts = [tokens(1, 6 + i, seed=i) for i in range(4)]
    expected = [model.generate(prompt, **NOTHING_ELSE) for prompt in prompts]
    passages = [[each.position for each in memory.recall(prompt[0])] for prompt in prompts]
    found: dict[int, Any] = {}

    def write(i: int) -> None:
        found[i] = model.generate(prompts[i], **NOTHING_ELSE), [each.position for each in memory.recall(prompts[i][0])]

    assert in_threads(*(lambda i=i: write(i) for i in range(4))) == []
    for i in range(4):
        assert torch.equal(found[i][0], expected[i])
        assert found[i][1] == passages[i]


@pytest.mark.parametrize("content", ["kv", "tokens"])
def test_a_document_is_forgotten_before_or_after_a_search_never_meanwhile(
    content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("llama", "sdpa"), tokens(1, 6)
    memory = read(attached(model, content=content), tokens(1, 60, seed=1), tokens(1, 60, seed=2))
    expected = logits(model, ids)
    search, threads = memory._recall.search, list[threading.Thread]()
    found = search._found

    def while_another_forgets(*inputs: Any) -> Any:
        one = found(*inputs)
        threads.append(threading.Thread(target=memory.forget, args=([0, 1],)))
        threads[0].start()
        threads[0].join(0.3)
        assert threads[0].is_alive()
        return one

    with monkeypatch.context() as patched:
        patched.setattr(search, "_found", while_another_forgets)
        assert torch.equal(logits(model, ids), expected)
    threads[0].join(60)
    assert not torch.equal(logits(model, ids), expected)
    assert memory.recall(ids[0]) == []


@pytest.mark.parametrize("content", ["kv", "tokens"])
def test_readers_go_on_while_a_writer_reads_and_forgets(content: str) -> None:
    model = tiny("llama", "sdpa")
    memory = read(attached(model, content=content, every=2, max_memories=150), tokens(1, 100))
    is_over = threading.Event()

    def write() -> None:
        try:
            for seed in range(6):
                memory.read(tokens(1, 60, seed=seed), document=f"book {seed}", progress=False)
                memory.clear() if seed == 3 else memory.forget(f"book {seed}")
        finally:
            is_over.set()

    def generate(seed: int) -> None:
        while True:
            text = model.generate(tokens(1, 5, seed=seed), **NOTHING_ELSE)
            assert text.shape == (1, 13)
            memory.recall(tokens(1, 5, seed=seed)[0])
            with memory.enabled(False):
                logits(model, tokens(1, 5, seed=seed))
            if is_over.is_set():
                return

    assert in_threads(write, lambda: generate(1), lambda: generate(2)) == []
