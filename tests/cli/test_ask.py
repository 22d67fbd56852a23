"""`ask` and `chat`, with a tiny model of transformers."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers_pytorch.library.readers import spans_in
from tests.cli.conftest import refused, said
from tests.library.conftest import make_run

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("head")
QUESTION = "What is the password of the vault?"


def sources(printed: str) -> list[str]:
    return re.findall(r"^\[\d+\] (.+), token [\d,]+: ", printed, re.MULTILINE)


@pytest.mark.parametrize("content", ["kv", "tokens"])
def test_a_library_that_memory_build_made_is_asked(
    content: str, model: str, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And built on, and merged, without being told again what it is."""
    library = tmp_path / "library"
    build = ["memory", "build", library, notes, "--model", model]
    first = json.loads(said(capsys, *build, "--retrieve", "spans", "--content", content, "--json"))
    assert (spans_in(library) or {})["content"] == content
    assert (first["read"], first["too_short"]) == (2, 0)
    before = {path.name: path.read_bytes() for path in library.iterdir()}
    ask = ["ask", "--model", model, "--memory", library, "--max-new-tokens", 4, "--passages", 2]
    printed = said(capsys, *ask, QUESTION)
    assert {Path(each).name for each in sources(printed)} <= {"vault.txt", "whale.txt"}
    assert sources(printed)
    assert printed == said(capsys, *ask, QUESTION)
    assert {path.name: path.read_bytes() for path in library.iterdir()} == before
    (notes / "short.txt").write_text("Short.")
    again = json.loads(said(capsys, *build, "--json"))
    assert (again["read"], again["unchanged"], again["too_short"], again["documents"]) == (1, 2, 0, 3)
    said(capsys, "memory", "build", tmp_path / "other", notes / "short.txt", *build[4:], "--retrieve", "spans",
         "--content", content)  # fmt: skip
    merged = said(capsys, "memory", "merge", tmp_path / "both", library, tmp_path / "other", "--model", model, "--json")
    assert json.loads(merged)["documents"] == 4


def test_a_long_file_is_read_on_where_it_was_left(model: str, notes: Path, tmp_path: Path) -> None:
    from memorizing_transformers_pytorch.library.readers import HubReader, open_reader

    text = (notes / "whale.txt").read_text()
    held = []
    for broken in (False, True):
        reader = open_reader(model, "cpu", max_memories=None, dtype=None, index=None, spans={})
        assert isinstance(reader, HubReader)
        if broken:
            next(iter(reader.read("whale", text, {}, None)))
            assert 0 < reader.memory.ledger.last.tokens < len(text)
            list(reader.read("whale", text, {}, reader.memory.ledger.last))
        else:
            list(reader.read("whale", text, {}, None))
        held.append(list(reader.memory.entries(0, 0)))
        assert reader.remembers(1)
    assert held[0] == held[1]
    assert [place for _, place, _ in held[0]] == list(range(len(text)))


def test_files_can_be_read_and_asked_at_once(
    model: str, notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["ask", "--model", model, "--max-new-tokens", 4, "--read"]
    assert set(sources(said(capsys, *options, notes, QUESTION))) <= {"vault.txt", "whale.txt"}
    for count in (1, 3):
        assert len(sources(said(capsys, *options, notes, "--passages", count, QUESTION))) == count
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(QUESTION.encode())))
    assert set(sources(said(capsys, *options, notes / "vault.txt", "-"))) == {"vault.txt"}


def test_a_chat_answers_each_line_until_it_ends(
    model: str, notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["chat", "--model", model, "--read", notes / "vault.txt", "--max-new-tokens", 3]
    printed = []
    for text in ("Who?\n\nWhy?\n", "Who?\nWhy?\n/quit\nWhen?\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        printed.append(said(capsys, *options))
    assert printed[0] == printed[1]
    assert printed[0].count("[1] vault.txt, token ") == 2


def test_what_cannot_be_asked_is_refused_in_one_line(
    model: str, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library, tokens = tmp_path / "library", tmp_path / "tokens"
    said(capsys, "memory", "build", library, notes / "vault.txt", "--model", model)
    said(capsys, "memory", "build", tokens, notes / "vault.txt", "--model", model, "--retrieve", "tokens")
    run = make_run(tmp_path / "run")
    ask: list[Any] = ["ask", "--model", model]
    for arguments, message in (
        ([*ask, QUESTION], "either --memory"),
        ([*ask, "--memory", library, "--read", notes, QUESTION], "either --memory"),
        ([*ask, "--memory", tokens, QUESTION], "holds a memory of tokens"),
        ([*ask, "--memory", notes, QUESTION], "which has no manifest.json"),
        ([*ask, "--memory", library, "--content", "kv", QUESTION], "--content is for --read"),
        ([*ask, "--read", tmp_path / "nowhere", QUESTION], "there is no file or folder"),
        ([*ask, "--read", notes, "--passages", 0, QUESTION], "--passages must be at least 1"),
        ([*ask, "--memory", library, " "], "the question is empty"),
        (["ask", "--model", run, "--read", notes, QUESTION], "need a model of transformers"),
        (
            ["memory", "build", library, notes, "--model", model, "--retrieve", "spans"],
            "are for a new memory only",
        ),
        (
            ["memory", "build", tmp_path / "new", notes, "--model", model, "--retrieve", "tokens", "--content", "kv"],
            "--content is for a memory of spans",
        ),
        (["memory", "build", tmp_path / "new", notes, "--model", run, "--retrieve", "spans"], "model of transformers"),
    ):
        assert message in refused(capsys, *arguments)
    assert not (tmp_path / "new").exists()


def test_a_library_of_token_ids_alone_is_searched_by_words(
    model: str, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bm25s")
    monkeypatch.setattr("memorizing_transformers_pytorch.huggingface.attach_spans.best_head", lambda *_: None)
    library = tmp_path / "library"
    options = ["--content", "tokens"]
    with pytest.warns(UserWarning, match="no induction head"):
        said(capsys, "memory", "build", library, notes, "--model", model, *options)
    ask = ["ask", "--model", model, "--memory", library, "--max-new-tokens", 2, "--passages", 1]
    assert Path(sources(said(capsys, *ask, QUESTION))[0]).name == "vault.txt"
    assert "this one keeps token ids alone" in refused(capsys, *ask, "--finder", "head", QUESTION)
