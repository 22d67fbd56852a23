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
from torch import Tensor

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface import attach_memory
from memorizing_transformers_pytorch.huggingface.models import run
from memorizing_transformers_pytorch.huggingface.probe import watching
from memorizing_transformers_pytorch.memory import KNNMemoryList
from tests.amounts import some
from tests.huggingface.families import tiny
from tests.huggingface.test_attach import tokens

RECENT, SKIPPED = 16, 2


class Entry(NamedTuple):
    """read: which text it was, and which token of it, whatever numbers and places it has been given since."""

    document: int
    place: int
    token: int
    read: tuple[int, int]


class Plain(NamedTuple):
    """Entries, how far the row is, and the number of the next document."""

    entries: list[Entry]
    place: int
    next_number: int


def contents(layer: Any) -> dict[tuple[int, int], tuple[int, Tensor, Tensor]]:
    """By document and place: the part of the memory in which an entry lies, its keys (G, D) and values."""
    found = {}
    for i, part in enumerate(layer.memories):
        _, keys, values, origins, _ = part.store.oldest(0, part.num_entries[0])
        pairs = zip(keys.floats()[0].transpose(0, 1), values.floats()[0].transpose(0, 1), strict=True)
        for (document, place, _), pair in zip(origins[0].tolist(), pairs, strict=True):
            found[document, place] = (i, *pair)
    return found


class Attached(RuleBasedStateMachine):
    """One row, which never fills. The second layer has no positions, so that it keeps all entries alike."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        options: dict[str, Any] = {"skip_first": SKIPPED, "chunk": 8, "recent": RECENT, "index": "exact"}
        self.memory = attach_memory(tiny("smollm3"), retrieve="tokens", layers="all", **options)
        self.plain, self.saved, self.seed = Plain([], 0, 0), Plain([], 0, 0), 0
        self.values: dict[int, dict[tuple[int, int], tuple[Tensor, Tensor]]] = {0: {}, 1: {}}
        modules = {0: self.memory.layers[0].module}
        self.memory.detach()
        with watching(self.memory.model, modules) as seen:
            run(self.memory.model, torch.arange(99)[:, None])
            assert seen[0].local is not None
            self.keys = seen[0].local.key[:, :, 0]  # (99, G, D): of each token at position 0, in the first layer
        self.memory = attach_memory(self.memory.model, retrieve="tokens", layers="all", **options)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(count=st.sampled_from([1, 2, 3, 7, 8, 9, 20, 50]))
    def read(self, count: int) -> None:
        self.seed += 1
        ids, (entries, place, number) = tokens(1, count, seed=self.seed)[0], self.plain
        self.memory.read(ids, document=f"text {self.seed}", progress=False)
        new = [Entry(number, place + i, int(ids[i]), (self.seed, i)) for i in range(SKIPPED, count)]
        self.plain = Plain(entries + new, place + count, number + 1)
        for index, layer in self.memory.layers.items():
            held = contents(layer)
            for entry in new:
                self.values[index][entry.read] = held[entry.document, entry.place][1:]

    @precondition(lambda self: self.plain.entries)
    @rule(chosen=st.integers(0, 1_000))
    def forget(self, chosen: int) -> None:
        held = sorted({entry.document for entry in self.plain.entries})
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
        moved = [entry._replace(document=entry.document + number, place=entry.place + place) for entry in more.entries]
        self.plain = Plain(entries + moved, place + more.place, number + more.next_number)

    @rule()
    def clear(self) -> None:
        self.memory.clear()
        self.plain = self.plain._replace(entries=[], place=0)

    @invariant()
    def holds_what_the_list_does(self) -> None:
        for layer in self.memory.layers:
            expected = sorted(entry[:3] for entry in self.plain.entries)
            assert sorted(map(tuple, self.memory.entries(0, layer))) == expected
        counts = {document.number: document.entries for document in self.memory.documents() if any(document.entries)}
        numbers = [entry.document for entry in self.plain.entries]
        assert counts == {number: (numbers.count(number),) * 2 for number in set(numbers)}

    @invariant()
    def each_entry_has_its_own_key_and_value(self) -> None:
        """In the first layer, the key of its token at its place, or at position 0 if it is old; in the other, which
        knows no positions, what it had when it was read."""
        if not self.plain.entries:
            return
        for index, layer in self.memory.layers.items():
            held = contents(layer)
            found = [held[entry.document, entry.place] for entry in self.plain.entries]
            known = [self.values[index][entry.read] for entry in self.plain.entries]
            expected = torch.stack([key for key, _ in known])
            if index == 0:
                turns = [
                    0 if part else entry.place for (part, *_), entry in zip(found, self.plain.entries, strict=True)
                ]
                bare = self.keys[[entry.token for entry in self.plain.entries]].transpose(0, 1)
                expected = layer.layer.rotary.turned(bare[None], torch.tensor([turns]))[0].transpose(0, 1)
            torch.testing.assert_close(torch.stack([key for _, key, _ in found]), expected, rtol=1e-3, atol=1e-3)
            assert torch.equal(torch.stack([value for *_, value in found]), torch.stack([value for _, value in known]))

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
TestAttached.settings = settings(max_examples=some(8, 200), stateful_step_count=25, deadline=None)
