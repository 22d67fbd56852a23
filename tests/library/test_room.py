"""The messages about documents that were evicted or are too short to be remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from memorizing_transformers_pytorch.explorer.service import Service
from memorizing_transformers_pytorch.library.build import evicted_since, held_titles, room_messages
from memorizing_transformers_pytorch.library.readers import open_reader
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.training.run import CONFIG
from tests.library.test_memory_command import run, told


def test_only_documents_that_held_something_are_evicted(model: str) -> None:
    reader = open_reader(model, "cpu", max_memories=200, dtype=None, index=None)
    list(reader.read("before", "x" * 60, {}, None))
    list(reader.read("short", "ab", {}, None))
    held = held_titles(reader.memory)
    assert list(held.values()) == ["before"]
    for n in range(8):
        list(reader.read(str(n), f"text {n} " * 8, {}, None))
        held[reader.memory.ledger.last.number] = str(n)
    left = held_titles(reader.memory).values()
    assert evicted_since(held, reader.memory) == ["before", *(str(n) for n in range(8) if str(n) not in left)]
    assert len(evicted_since(held, reader.memory)) > 3


def test_what_is_said_counts_one_and_many() -> None:
    assert room_messages([], []) == []
    assert room_messages(["a", "b"], ["c"]) == [
        "too short to be remembered: a, b",
        "the memory is full: 1 document was evicted",
    ]
    assert room_messages([], ["c"] * 2, " (x)") == ["the memory is full: 2 documents were evicted (x)"]


def test_a_build_says_what_became_of_its_own_files_once(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, memory = tmp_path / "files", tmp_path / "memory"
    files.mkdir()
    (files / "a.txt").write_text("ab")
    build = ("build", memory, files, "--model", model)
    run(*build, "--max-memories", 400, "--retrieve", "tokens")
    err = capsys.readouterr().err
    assert f"too short to be remembered: {files / 'a.txt'}" in err
    assert "the memory is full" not in err
    for n in range(8):
        (files / f"b{n}.txt").write_text(f"text {n} of eight. " * 8)
    result = told(capsys, *build)
    before = held(memory)
    assert (result["too_short"], result["evicted"]) == (0, 8 - len(before))
    # Of an attached memory, what stands too far behind is demoted sooner, as documents leave their first tokens out.
    assert result["evicted"] == (4 if (Path(model) / CONFIG).is_file() else 5)
    (files / "c.txt").write_text("the last of them. " * 2)
    later = told(capsys, "build", memory, files / "c.txt", "--model", model)
    assert later["evicted"] == len(before - held(memory)) < 2


def held(memory: Path) -> set[str]:
    """The files of which something is remembered."""
    return {Path(each.title).name for each in KNNMemoryList.load(memory).documents() if any(each.entries)}


def test_the_explorer_tells_a_short_text_from_a_full_memory(model: str) -> None:
    service = Service(open_reader(model, "cpu", max_memories=None, dtype=None, index=None))
    assert service.read("me", "hi.txt", b"hi") == "Read hi.txt: 2 tokens. Too short to be remembered: hi.txt."
    assert service.read("me", "whale.txt", b"the whale " * 9) == "Read whale.txt: 90 tokens."
