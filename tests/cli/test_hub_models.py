"""`generate` and `evaluate` with a tiny model of transformers."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers_pytorch.library.readers import open_reader
from tests.cli.conftest import refused, said

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("head")
PROMPT = "the password of the vault is"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("retrieve", ["spans", "tokens"])
def test_a_prompt_is_continued_with_what_was_read_or_built(
    retrieve: str, model: str, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is known for what it is, and stays as it is."""
    library = tmp_path / "library"
    said(capsys, "memory", "build", library, notes / "vault.txt", "--model", model, "--retrieve", retrieve)
    before = contents(library)
    write = ["generate", model, "--prompt", PROMPT, "--max-new-tokens", 8, "--temperature", 0]
    built = said(capsys, *write, "--memories", library)
    read = said(capsys, *write, "--read", notes / "vault.txt", "--retrieve", retrieve)
    alone = said(capsys, *write)
    assert built == read != alone
    assert built.startswith(PROMPT)
    assert contents(library) == before
    assert said(capsys, *write, "--stop", built[len(PROMPT) + 1]) != built


def test_what_a_model_of_transformers_writes_is_decided_by_the_seed_and_may_come_from_standard_input(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ["generate", model, "--max-new-tokens", 8, "--temperature", 1, "--prompt"]
    assert said(capsys, *write, PROMPT) == said(capsys, *write, PROMPT)
    assert said(capsys, *write, PROMPT) != said(capsys, *write, PROMPT, "--seed", 1)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert said(capsys, *write, "-") == said(capsys, *write, PROMPT)


@pytest.mark.parametrize("retrieve", ["spans", "tokens"])
def test_an_evaluation_tells_what_the_memory_is_worth(
    retrieve: str, model: str, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library, first, second = tmp_path / "library", tmp_path / "first", tmp_path / "second"
    evaluate: list[Any] = ["evaluate", model, "--source", notes, "--output"]
    printed = said(capsys, *evaluate, first, "--retrieve", retrieve)
    assert "| memory on |" in printed
    assert printed.startswith((first / "evaluation.md").read_text())
    found = json.loads((first / "evaluation.json").read_text())
    assert {Path(each["name"]).name for each in found["documents"]} == {"vault.txt", "whale.txt"}
    assert found["modes"]["memory"]["loss"] != found["modes"]["off"]["loss"]
    said(capsys, "memory", "build", library, notes / "whale.txt", "--model", model, "--retrieve", retrieve)
    before = contents(library)
    said(capsys, *evaluate, second, "--memories", library, "--documents", 1, "--max-tokens", 200)
    (document,) = json.loads((second / "evaluation.json").read_text())["documents"]
    assert document["tokens"] <= 200
    assert document["loss"]["memory"] != document["loss"]["off"]
    assert contents(library) == before


def test_what_is_for_runs_alone_is_refused(
    model: str, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generate, evaluate = ["generate", model, "--prompt", "x"], ["evaluate", model, "--source", notes]
    for arguments, message in (
        (["generate", model], "continues a prompt: give --prompt"),
        ([*generate, "--segment-length", 5], "--segment-length is for runs"),
        ([*generate, "--checkpoint", "best"], "--checkpoint is for runs"),
        ([*generate, "--memories", notes, "--retrieve", "spans"], "is used as it was built"),
        ([*generate, "--no-memory", "--read", notes / "vault.txt"], "--no-memory leaves nothing to do"),
        ([*generate, "--temperature", -1], "expected temperature to be at least 0"),
        (["evaluate", model], "add --source"),
        ([*evaluate, "--memory", "5"], "--memory is for runs"),
        ([*evaluate, "--memories", notes, "--retrieve", "spans"], "is used as it was built"),
        ([*evaluate, "--min-tokens", 9_999], "expected documents of at least 9999 tokens"),
        (["generate", "shipped", "--prompt", "x", "--retrieve", "spans"], "is for models of transformers"),
        (["evaluate", "shipped", "--retrieve", "spans"], "are for models of transformers"),
        (["generate", tmp_path, "--prompt", "x"], "is not a training run"),
    ):
        assert message in refused(capsys, *arguments)
    assert not (tmp_path / "evaluation").exists()


def test_the_shipped_model_is_evaluated_by_its_name(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without writing beside it."""
    monkeypatch.chdir(tmp_path)
    options = ["--source", notes, "--cache", tmp_path / "cache", "--memory", "64", "--no-controls"]
    said(capsys, "evaluate", "shipped", *options, "--documents", 1, "--max-tokens", 60)
    assert (tmp_path / "evaluation" / "evaluation.md").is_file()


def test_what_is_written_ends_where_the_model_ends_a_text(model: str) -> None:
    reader: Any = open_reader(model, "cpu", max_memories=None, dtype=None, index=None, spans={})
    tokens = reader.tokenizer.encode(PROMPT)
    reader.model.generation_config.eos_token_id = None
    first, *rest = islice(reader.written(tokens), 5)
    assert len(rest) == 4
    reader.model.generation_config.eos_token_id = [first]
    assert list(islice(reader.written(tokens), 5)) == []
