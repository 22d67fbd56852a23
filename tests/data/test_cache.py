"""The cache: what is read from it is what was written, and it is whole or not there."""

from __future__ import annotations

import json
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing_transformers_pytorch.data.cache import TokenisedDocuments, build
from memorizing_transformers_pytorch.data.document import SPLITS, Split, TextDocument
from memorizing_transformers_pytorch.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from tests.data.texts import prose

DOCUMENTS: list[tuple[Split, TextDocument]] = [
    ("train", TextDocument("one", "caf\N{LATIN SMALL LETTER E WITH ACUTE}")),
    ("test", TextDocument("two\n\udce9", "raw \udce9")),
    ("train", TextDocument("three", "")),
    ("train", TextDocument("four", prose(0, 200))),
]


def make(cache: Path, fingerprint: str = "print") -> Path:
    return build(cache, fingerprint, DOCUMENTS, ByteTokenizer(), {"source": "here"})


def test_each_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = make(tmp_path)
    train, valid, test = (TokenisedDocuments(folder, split) for split in SPLITS)
    assert [bytes(tokens.astype(np.uint8)) for tokens in train] == [
        document.text.encode() for split, document in DOCUMENTS if split == "train"
    ]
    assert train.names == ["one", "three", "four"]
    assert train.num_bytes.tolist() == [5, 0, len(prose(0, 200))]
    assert train.total_bytes == train.num_tokens_total == train.num_bytes.sum()
    assert test.names == ["two\n\udce9"]
    assert bytes(test[0].astype(np.uint8)) == b"raw \xe9"
    assert (len(valid), valid.num_tokens_total, valid.total_bytes, valid.names) == (0, 0, 0, [])
    assert load_tokenizer(folder / "tokenizer.json").num_tokens == 256
    meta = json.loads((folder / "meta.json").read_text())
    assert meta.pop("splits").keys() == set(SPLITS)
    assert meta == {"source": "here", "dtype": "<u2", "num_tokens": 256}


@given(st.lists(st.tuples(st.sampled_from(SPLITS), st.text(st.characters(codec="utf-8"))), max_size=20), st.booleans())
def test_any_documents_survive_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[Split, str]], twice: bool
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    documents = [(split, TextDocument(text, text)) for split, text in texts]
    for _ in range(1 + twice):
        built = build(folder, "print", documents, ByteTokenizer(), {})
    for split in SPLITS:
        read, expected = TokenisedDocuments(built, split), [text for side, text in texts if side == split]
        assert read.names == expected
        assert [bytes(tokens.astype(np.uint8)).decode() for tokens in read] == expected


def test_a_document_is_a_view_of_the_file(tmp_path: Path) -> None:
    train = TokenisedDocuments(make(tmp_path), "train")
    assert np.shares_memory(train[0], train[0])
    assert not train[0].flags.owndata
    assert not train[0].flags.writeable
    assert train[-1].tolist() == train[2].tolist()
    assert [tokens.tolist() for tokens in train[:2]] == [train[0].tolist(), []]
    for number in (3, -4):
        with pytest.raises(IndexError, match="expected a document below 3"):
            train[number]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        num_tokens = 100_000  # type: ignore[assignment]

        def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
            return [np.full(len(text), 99_999) for text in texts]

    folder = build(tmp_path, "print", DOCUMENTS, Wide(), {})
    assert TokenisedDocuments(folder, "train")[0].tolist() == [99_999] * 4


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    folder = make(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert make(tmp_path, "other") != folder


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def failing() -> Iterator[tuple[Split, TextDocument]]:
        yield from DOCUMENTS
        raise error

    with pytest.raises(error):
        build(tmp_path, "print", failing(), ByteTokenizer(), {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_never_used_and_removed_when_stale(tmp_path: Path) -> None:
    stale, living = tmp_path / ".building-print-1", tmp_path / ".building-print-2"
    for aside in (stale, living):
        aside.mkdir()
        (aside / "train.tokens").write_bytes(b"half")
    for path in (stale / "train.tokens", stale):
        os.utime(path, (1, 1))
    TokenisedDocuments(make(tmp_path), "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "print"]


def test_a_build_whose_documents_are_long_in_coming_is_no_stale_one(tmp_path: Path) -> None:
    def late() -> Iterator[tuple[Split, TextDocument]]:
        (aside,) = tmp_path.iterdir()
        day_ago = time.time() - 24 * 3600
        for path in (*aside.iterdir(), aside):
            os.utime(path, (day_ago, day_ago))
        make(tmp_path, "other")
        yield from DOCUMENTS

    folder = build(tmp_path, "print", late(), ByteTokenizer(), {})
    assert TokenisedDocuments(folder, "train").names == ["one", "three", "four"]


def test_a_builder_that_is_done_just_now_disturbs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: iter([tmp_path / ".building-gone"]))
    monkeypatch.setattr(Path, "exists", lambda _: True)  # as it was when it was asked
    assert make(tmp_path).is_dir()


def test_the_content_is_that_of_tokens_and_names_in_order(tmp_path: Path) -> None:
    def content(*documents: tuple[str, str], cache: Path = tmp_path) -> str:
        sided: list[tuple[Split, TextDocument]] = [("train", TextDocument(*document)) for document in documents]
        folder = build(cache, str(documents), [*sided, ("test", TextDocument("t", "t"))], ByteTokenizer(), {})
        assert TokenisedDocuments(folder, "valid").content == none
        return TokenisedDocuments(folder, "train").content

    none = TokenisedDocuments(build(tmp_path, "empty", [], ByteTokenizer(), {}), "train").content
    found = content(("a", "xy"), ("b", "z"))
    others = [(("b", "z"), ("a", "xy")), (("a", "x"), ("b", "yz")), (("c", "xy"), ("b", "z"))]
    assert len({none, found, *(content(*documents) for documents in others)}) == 5
    assert content(("a", "xy"), ("b", "z"), cache=tmp_path / "elsewhere") == found


def test_names_are_read_when_they_are_asked_for_and_lengths_are_an_array(tmp_path: Path) -> None:
    folder = make(tmp_path)
    train = TokenisedDocuments(folder, "train")
    assert "names" not in vars(train)
    assert isinstance(train.num_bytes, np.memmap)
    assert isinstance(train.lengths, np.ndarray)
    assert train.lengths.tolist() == [len(tokens) for tokens in train]
    assert train.names is train.names


def test_a_large_document_takes_little_more_memory_than_its_text(tmp_path: Path) -> None:
    documents: list[tuple[Split, TextDocument]] = [("train", TextDocument("large", "x" * 4_000_000))]
    tracemalloc.start()
    try:
        build(tmp_path, "print", documents, ByteTokenizer(), {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 4_000_000


def test_builders_at_once_end_with_one_good_cache(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def slowly() -> Iterator[tuple[Split, TextDocument]]:
        barrier.wait()
        yield from DOCUMENTS

    def run() -> None:
        folders.append(build(tmp_path, "print", slowly(), ByteTokenizer(), {}))

    folders: list[Path] = []
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == 4 * [tmp_path / "print"]
    assert list(tmp_path.iterdir()) == [tmp_path / "print"]
    assert TokenisedDocuments(tmp_path / "print", "train").names == ["one", "three", "four"]


@pytest.mark.parametrize("name", ["train.tokens", "train.offsets.npy", "train.bytes.npy", "train.names", "meta.json"])
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = make(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"expected .* got ") as caught:
        TokenisedDocuments(path.parent, "train")
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match="expected tokenised documents, got a damaged"):
        TokenisedDocuments(path.parent, "train")


@pytest.mark.parametrize(
    "numbers", [[0, 9, 5, 1157], [1, 5, 5, 1157], [[0, 5, 5, 1157]], [0.0, 5.0, 5.0, 1157.0], ["0", "1", "2", "3"], []]
)
def test_documents_that_overlap_or_have_no_places_are_refused(tmp_path: Path, numbers: list[Any]) -> None:
    folder = make(tmp_path)
    np.save(folder / "train.offsets.npy", np.array(numbers))
    with pytest.raises(ValueError, match="expected tokenised documents, got a damaged"):
        TokenisedDocuments(folder, "train")


@pytest.mark.parametrize("numbers", [[5, -1, 1152], [2**62, 2**62, 2**62]])
def test_impossible_sizes_are_refused(tmp_path: Path, numbers: list[int]) -> None:
    folder = make(tmp_path)
    np.save(folder / "train.bytes.npy", np.array(numbers))
    with pytest.raises(ValueError, match="expected tokenised documents, got a damaged"):
        TokenisedDocuments(folder, "train")


@pytest.mark.parametrize("meta", [{"dtype": "|O"}, {"dtype": "<f4"}, {"dtype": []}, {"splits": []}])
def test_tokens_of_another_type_are_refused(tmp_path: Path, meta: dict[str, Any]) -> None:
    folder = make(tmp_path)
    (folder / "meta.json").write_text(json.dumps(json.loads((folder / "meta.json").read_text()) | meta))
    with pytest.raises(ValueError, match="expected tokenised documents, got a damaged"):
        TokenisedDocuments(folder, "train")


def test_names_that_are_not_one_for_each_document_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path) / "train.names"
    size = path.stat().st_size
    for text in ('"a"\n', "1\n2\n3\n", "[" * 10):
        path.write_text(text.ljust(size))
        with pytest.raises(ValueError, match=r"expected .*train\.names', got"):
            _ = TokenisedDocuments(path.parent, "train").names


def test_many_and_long_documents_are_written_in_batches(tmp_path: Path) -> None:
    texts = [*(f"short {number}" for number in range(600)), "long " * 300_000, "last"]
    documents: list[tuple[Split, TextDocument]] = [
        ("train", TextDocument(str(number), text)) for number, text in enumerate(texts)
    ]
    tokenizer = BPETokenizer.train(["short long last"], 256)
    train = TokenisedDocuments(build(tmp_path, "print", documents, tokenizer, {}), "train")
    assert all(tokenizer.decode(tokens.tolist()) == text for tokens, text in zip(train, texts, strict=True))
