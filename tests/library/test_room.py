"""What is said of documents that had to make room, and of those that are too short to be remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from memorizing_transformers_pytorch.explorer.service import Service
from memorizing_transformers_pytorch.library.readers import DocumentReader, open_reader
from memorizing_transformers_pytorch.library.room import Room, in_words
from memorizing_transformers_pytorch.memory import KNNMemoryList
from tests.library.test_memory_command import run, told


def read(reader: DocumentReader, room: Room, title: str, text: str) -> None:
    list(reader.read(title, text, {}, None))
    room.note_read(reader.ledger.documents()[-1])


def test_only_documents_that_held_something_had_to_make_room(model: str) -> None:
    reader = open_reader(model, "cpu", max_memories=200, dtype=None, index=None)
    read(reader, Room(reader), "before", "x" * 60)
    room = Room(reader)
    read(reader, room, "forgotten", "y" * 30)
    room.note_forgotten(reader.ledger.documents()[-1].number)
    reader.forget(reader.ledger.documents()[-1].number)
    read(reader, room, "short", "ab")
    assert (room.too_short, room.made()) == (["short"], [])
    for n in range(8):
        read(reader, room, str(n), f"text {n} " * 8)
    held = {each.title for each in reader.documents() if any(each.entries)}
    assert room.made() == ["before", *(str(n) for n in range(8) if str(n) not in held)]
    assert len(room.made()) > 3
    assert room.too_short == ["short"]


def test_what_is_said_counts_one_and_many() -> None:
    assert in_words([], []) == []
    assert in_words(["a", "b"], ["c"]) == [
        "too short to be remembered: a, b",
        "the memory is full: 1 document had to make room",
    ]
    assert in_words([], ["c"] * 2, " (x)") == ["the memory is full: 2 documents had to make room (x)"]


def test_a_build_says_what_became_of_its_own_files_once(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, memory = tmp_path / "files", tmp_path / "memory"
    files.mkdir()
    (files / "a.txt").write_text("ab")
    build = ("build", memory, files, "--model", model)
    run(*build, "--max-memories", 400)
    err = capsys.readouterr().err
    assert f"too short to be remembered: {files / 'a.txt'}" in err
    assert "the memory is full" not in err
    for n in range(8):
        (files / f"b{n}.txt").write_text(f"text {n} of eight. " * 8)
    result = told(capsys, *build)
    before = held(memory)
    assert (result["too_short"], result["made_room"]) == (0, 8 - len(before))
    assert result["made_room"] == 4
    (files / "c.txt").write_text("the last of them. " * 2)
    later = told(capsys, "build", memory, files / "c.txt", "--model", model)
    assert later["made_room"] == len(before - held(memory)) < 2


def held(memory: Path) -> set[str]:
    """The files of which something is remembered."""
    return {Path(each.title).name for each in KNNMemoryList.load(memory).documents() if any(each.entries)}


def test_the_explorer_tells_a_short_text_from_a_full_memory(model: str) -> None:
    service = Service(open_reader(model, "cpu", max_memories=None, dtype=None, index=None))
    assert service.read("me", "hi.txt", b"hi") == "Read hi.txt: 2 tokens. Too short to be remembered: hi.txt."
    assert service.read("me", "whale.txt", b"the whale " * 9) == "Read whale.txt: 90 tokens."
