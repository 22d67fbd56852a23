"""Whatever is read, forgotten, saved, loaded and merged: an attached memory holds what a plain list does."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface import attach_memory
from memorizing_transformers_pytorch.memory import KNNMemoryList
from tests.huggingface.families import tiny
from tests.huggingface.test_attach import tokens

RECENT, SKIPPED = 16, 2


class Plain(NamedTuple):
    """Entries (document, place, token), how far the row is, and the number of the next document."""

    entries: list[tuple[int, int, int]]
    place: int
    next_number: int


class Attached(RuleBasedStateMachine):
    """One row, which never fills. The second layer has no positions, so that it keeps all entries alike."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        options: dict[str, Any] = {"skip_first": SKIPPED, "chunk": 8, "recent": RECENT, "index": "exact"}
        self.memory = attach_memory(tiny("smollm3"), layers="all", **options)
        self.plain, self.saved, self.seed = Plain([], 0, 0), Plain([], 0, 0), 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(count=st.sampled_from([1, 2, 3, 7, 8, 9, 20, 50]))
    def read(self, count: int) -> None:
        self.seed += 1
        ids, (entries, place, number) = tokens(1, count, seed=self.seed)[0], self.plain
        self.memory.read(ids, document=f"text {self.seed}", progress=False)
        new = [(number, place + i, int(ids[i])) for i in range(SKIPPED, count)]
        self.plain = Plain(entries + new, place + count, number + 1)

    @precondition(lambda self: self.plain.entries)
    @rule(chosen=st.integers(0, 1_000))
    def forget(self, chosen: int) -> None:
        held = sorted({document for document, _, _ in self.plain.entries})
        gone = held[chosen % len(held)]
        self.memory.forget(gone)
        kept = [entry for entry in self.plain.entries if entry[0] != gone]
        self.plain = self.plain._replace(entries=kept)

    @rule()
    def save(self) -> None:
        self.memory.save(self.folder / "memory", overwrite=True)
        self.saved = self.plain

    @precondition(lambda self: self.saved.next_number)
    @rule(mmap=st.booleans())
    def load(self, mmap: bool) -> None:
        self.memory.load(self.folder / "memory", mmap=mmap)
        self.plain = self.saved

    @precondition(lambda self: self.saved.next_number and len(self.plain.entries) < 500)
    @rule()
    def merge(self) -> None:
        """With what was saved, which is refused while its documents are held, and with a copy under another state."""
        saved, other = self.folder / "memory", self.folder / "other"
        if {each[0] for each in self.plain.entries} & {each[0] for each in self.saved.entries}:
            with pytest.raises(ValueError, match="hold documents of the same saved state"):
                self.memory.merge(saved)
            self.holds_what_the_list_does()
        KNNMemoryList.load(saved).save(other, overwrite=True)
        self.memory.merge(other)
        (entries, place, number), more = self.plain, self.saved
        moved = [(document + number, at + place, token) for document, at, token in more.entries]
        self.plain = Plain(entries + moved, place + more.place, number + more.next_number)

    @rule()
    def clear(self) -> None:
        self.memory.clear()
        self.plain = self.plain._replace(entries=[], place=0)

    @invariant()
    def holds_what_the_list_does(self) -> None:
        for layer in self.memory.layers:
            assert sorted(map(tuple, self.memory.entries(0, layer))) == sorted(self.plain.entries)
        counts = {document.number: document.entries for document in self.memory.documents() if any(document.entries)}
        numbers = [document for document, _, _ in self.plain.entries]
        assert counts == {number: (numbers.count(number),) * 2 for number in set(numbers)}

    @invariant()
    def no_recent_entry_is_farther_away_than_the_longest_context(self) -> None:
        """Which is twice as long as what counts as recent."""
        for layer in self.memory.layers.values():
            if len(layer.memories) == 2:
                places = [origin.position for origin in layer.memories[0].entries(0)]
                assert all(self.plain.place - place <= 2 * RECENT for place in places)

    @invariant()
    def the_model_stays_finite(self) -> None:
        with torch.no_grad():
            assert self.memory.model(input_ids=tokens(1, 3)).logits.isfinite().all()


TestAttached = Attached.TestCase
TestAttached.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
