"""Near-duplicates: found if alike as runs of words, grouped with all that are alike to one of them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing_transformers_pytorch.data.document import TextDocument
from memorizing_transformers_pytorch.data.duplicates import near_duplicate_leaders
from tests.amounts import some
from tests.data.texts import near_copy, prose

TEXT = prose(0, 400)


def test_near_copies_are_found_and_led_by_the_smallest_name() -> None:
    documents = [TextDocument(name, near_copy(TEXT, number)) for number, name in enumerate("cab")]
    found = near_duplicate_leaders([*documents, TextDocument("d", prose(1, 400))], 0.8)
    assert found == {"a": "a", "b": "a", "c": "a"}


@pytest.mark.parametrize(("shared", "grouped"), [(380, True), (200, False), (0, False)])
def test_the_threshold_is_a_jaccard_similarity(shared: int, grouped: bool) -> None:
    words, other = TEXT.split(), prose(1, 400).split()
    documents = [TextDocument("a", TEXT), TextDocument("b", " ".join(words[:shared] + other[shared:]))]
    assert bool(near_duplicate_leaders(documents, 0.8)) is grouped


def test_a_chain_of_near_copies_is_one_group() -> None:
    words, texts = TEXT.split(), []
    for number in range(6):
        words[60 * number : 60 * number + 20] = [f"new{number}.{place}" for place in range(20)]
        texts.append(" ".join(words))
    documents = [TextDocument(str(number), text) for number, text in enumerate(texts)]
    assert near_duplicate_leaders([documents[0], documents[-1]], 0.8) == {}
    assert near_duplicate_leaders(documents, 0.8) == dict.fromkeys("012345", "0")


@settings(max_examples=some(10, 200))
@given(st.permutations(range(9)))
def test_groups_do_not_depend_on_the_order(order: list[int]) -> None:
    documents = [TextDocument(str(number), near_copy(prose(number // 3, 200), number % 3)) for number in order]
    assert near_duplicate_leaders(documents, 0.8) == {str(number): str(number - number % 3) for number in range(9)}


def test_short_and_empty_texts() -> None:
    texts = {
        "a": "",
        "b": " \n",
        "c": "one two",
        "d": "one  two\n",
        "e": "one three",
        "f": "caf\udce9",
        "g": "caf\udce9",
    }
    documents = [TextDocument(name, text) for name, text in texts.items()]
    assert near_duplicate_leaders(documents, 0.8) == {"c": "c", "d": "c", "f": "f", "g": "f"}


def test_little_is_kept_in_memory_of_each_document() -> None:
    def names() -> Iterator[TextDocument]:
        yield from (TextDocument(str(number), prose(number, 8)) for number in range(600))

    near_duplicate_leaders([TextDocument("a", "what is imported and made once")], 0.8)
    tracemalloc.start()
    try:
        assert near_duplicate_leaders(names(), 0.8) == {}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 600 * 800


def test_nothing_is_found_in_nothing() -> None:
    assert near_duplicate_leaders([], 0.8) == near_duplicate_leaders([TextDocument("a", "")], 0.8) == {}


def test_documents_of_one_name_are_one() -> None:
    documents = [TextDocument("b", TEXT), TextDocument("b", TEXT), TextDocument("a", TEXT)]
    assert near_duplicate_leaders(documents, 1.0) == {"a": "a", "b": "a"}
