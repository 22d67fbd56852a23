"""The split: a document's side depends on its name and its near-copies, and on nothing else."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing_transformers_pytorch.data.document import TextDocument
from memorizing_transformers_pytorch.data.prepare import Splitter, make_splitter
from tests.data.texts import near_copy, prose

SPLITTER = Splitter(valid=0.05, test=0.1)
NAMES = [f"module{number}" for number in range(2000)]


def test_the_shares_are_those_asked_for() -> None:
    sides = [SPLITTER(TextDocument(name, "")) for name in NAMES]
    assert 150 < sides.count("test") < 250
    assert 60 < sides.count("valid") < 140
    nothing = Splitter(valid=0.0, test=0.0)
    assert {nothing(TextDocument(name, "")) for name in NAMES} == {"train"}


def test_the_side_of_a_name_never_changes() -> None:
    """Results are comparable with those of the past only if the same documents are held out."""
    held_out = [name for name in NAMES[:60] if SPLITTER(TextDocument(name, "")) == "test"]
    assert held_out == ["module0", "module15", "module28", "module31", "module32", "module37"]


def test_what_the_corpus_assigns_stays() -> None:
    assert SPLITTER(TextDocument("module0", "", "valid")) == "valid"


@settings(max_examples=30)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_order_and_other_documents_change_nothing(order: list[int], count: int) -> None:
    documents = [TextDocument(f"{number}", prose(number, 40)) for number in order[:count]]
    found = make_splitter(documents, valid=0.2, test=0.3, near_duplicates=0.8)
    alone = Splitter(valid=0.2, test=0.3)
    assert [found(document) for document in documents] == [alone(document) for document in documents]


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_near_copies_never_lie_on_both_sides(seed: int, count: int) -> None:
    text = prose(seed, 400)
    documents = [TextDocument(f"{seed}.{number}", near_copy(text, number)) for number in range(count)]
    others = [TextDocument(f"other{number}", prose(seed + number + 1, 50)) for number in range(5)]
    shuffled = documents + others
    random.Random(seed).shuffle(shuffled)
    splitter = make_splitter(shuffled, valid=0.3, test=0.3, near_duplicates=0.8)
    assert len({splitter(document) for document in documents}) == 1
    assert splitter(documents[0]) == Splitter(valid=0.3, test=0.3)(documents[0])


def test_near_copies_may_be_ignored() -> None:
    documents = [TextDocument(str(number), "the same") for number in range(100)]
    splitter = make_splitter(documents, valid=0.3, test=0.3, near_duplicates=None)
    assert {splitter(document) for document in documents} == {"train", "valid", "test"}
