"""`explain`: from files or a memory on disk to a page, with a tiny run and a tiny model of transformers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from memorizing_transformers_pytorch.cli import main
from memorizing_transformers_pytorch.training.run import newest_run
from tests.library.conftest import make_hub_model, make_run

TOKENS = ["--retrieve", "tokens"]
FACT = "The answer to the question of life is forty-two, as everybody knows. " * 3


@pytest.fixture(params=["run", "hub"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str((make_run if request.param == "run" else make_hub_model)(tmp_path / "model"))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "fact.txt").write_text(FACT)
    (folder / "other.txt").write_text("Nothing of that kind. " * 9)
    (folder / "empty.txt").write_text("\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *arguments])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_files_are_read_and_the_page_names_them(
    model: str, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    main(["explain", "--model", model, "--read", str(notes), *TOKENS, "--prompt", "the question of", "-o", str(page)])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(page)
    assert "15 tokens" in printed
    assert str(notes / "fact.txt") in page.read_text()
    assert "empty.txt" not in page.read_text()


def test_what_is_no_text_is_left_out_of_a_folder_and_refused_by_name(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (notes / "latin.txt").write_bytes("Où".encode("latin-1"))
    (notes / "picture.png").write_bytes(b"\x89PNG\0\0")
    given = ["--model", str(make_run(tmp_path / "run")), "--prompt", "the question of", "--read"]
    main(["explain", *given, str(notes), "--json"])
    printed = capsys.readouterr()
    skipped = [line.split(": ")[0] for line in printed.err.splitlines() if line.startswith("skipped")]
    assert skipped == [f"skipped {notes / name}" for name in ("empty.txt", "latin.txt", "picture.png")]
    assert {each["title"] for each in json.loads(printed.out)["documents"]} >= {str(notes / "fact.txt")}
    for name, message in (("picture.png", "picture.png: binary file"), ("empty.txt", "empty.txt: empty file")):
        assert message in failed([*given, str(notes / name)], capsys)


def test_it_is_said_which_files_a_memory_has_no_room_for(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(4):
        (folder / f"{n}.txt").write_text(f"text {n} of four. " * 6)
    (folder / "short.txt").write_text("ab")
    given = ["explain", "--model", model, "--read", str(folder), *TOKENS, "--prompt", "text", "--json"]
    main([*given, "--max-memories", "150"])
    said = capsys.readouterr().err
    assert "the memory is full: 2 documents were evicted (--max-memories, for a new memory)" in said
    assert f"too short to be remembered: {folder / 'short.txt'}" in said
    main(given)
    assert "the memory is full" not in capsys.readouterr().err


def test_a_memory_on_disk_is_looked_up_and_stays_as_it_is(
    model: str, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "library"
    main(["memory", "build", str(library), str(notes), "--model", model, *TOKENS])
    before = contents(library)
    (tmp_path / "more.txt").write_text("What was the question? " * 4)
    given = ["--model", model, "--memory", str(library), "--prompt", "the question", "--json"]
    capsys.readouterr()
    main(["explain", *given, "--contribution", "ablate", "--read", str(tmp_path / "more.txt")])
    found = json.loads(capsys.readouterr().out)
    assert contents(library) == before
    titles = {str(notes / "fact.txt"), str(notes / "other.txt"), str(tmp_path / "more.txt")}
    assert {each["title"] for each in found["documents"]} <= titles
    assert "".join(each["text"] for each in found["tokens"]) == "the question"
    assert found["tokens"][0]["loss"] is None
    assert all(each["contribution"] is not None for each in found["passages"])
    assert found["entries"][0].keys() >= {"token", "layer", "head", "weight", "title", "position", "age"}


def test_json_has_the_best_entries_of_each_token_unless_all_are_asked_for(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(make_run(tmp_path / "run")), "--read", str(notes), "--prompt", "the question", "--json"]
    found = []
    for more in ([], ["--all-entries"]):
        capsys.readouterr()
        main(["explain", *given, *more])
        found.append(json.loads(capsys.readouterr().out))
    few, everything = (each.pop("entries") for each in found)
    assert found[0] == found[1]
    assert len(everything) == found[0]["looked_up"] > len(few)
    for token in range(len(found[0]["tokens"])):
        assert [e for e in few if e["token"] == token] == [e for e in everything if e["token"] == token][:8]


def test_without_any_run_the_model_that_comes_with_the_package_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it makes use of its memory: what was read is more likely when it comes again."""
    monkeypatch.chdir(tmp_path)
    definition = "def collect_parcels_of_harbour(self, invoices):\n    return self.parcels_of_harbour(invoices)\n"
    (tmp_path / "parcels.py").write_text(f"import os\n\n\n{definition}\n\nclass Other:\n    pass\n" * 3)
    main(["explain", "--prompt", definition, "--read", "parcels.py", "--json"])
    printed = capsys.readouterr()
    assert "no run below 'runs': the model that comes with the package is used" in printed.err
    assert "memorizing-transformers train makes one" in printed.err
    found = json.loads(printed.out)["tokens"][1:]
    with_memory, alone = (sum(each[name] for each in found) for name in ("loss", "loss_without_memory"))
    assert with_memory < 0.7 * alone
    main(["explain", "--prompt", definition, "--read", "parcels.py"])
    assert "What the shipped model looked up" in (tmp_path / "report.html").read_text()


def test_unless_told_the_newest_run_explains_into_report_html(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--prompt", "the question", "--read", str(notes)]
    for age, name in enumerate(["new", "old"]):
        checkpoint = make_run(tmp_path / "runs" / name, seed=age) / "checkpoints" / "step-1"
        os.utime(checkpoint, (time.time() - 1_000 * age,) * 2)
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "config.yaml").touch()
    assert newest_run(Path("runs")) == Path("runs/new")
    main(["explain", *given])
    assert "no run below" not in capsys.readouterr().err
    assert "What new looked up" in (tmp_path / "report.html").read_text()


def test_what_cannot_be_done_is_said_before_anything_is_read(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = ["--model", "nowhere", "--read", str(notes / "fact.txt")]
    for given, message in [
        ([*read, "--prompt", " \n"], "expected a text to explain, by --prompt, got an empty one"),
        (["--model", "nowhere", "--prompt", "x"], "expected something to look up, by --memory or --read, got neither"),
        ([*read, "--prompt", "x", "-o", str(tmp_path)], "which is a folder or a device"),
        ([*read, "--prompt", "x", "-o", os.devnull], "which is a folder or a device"),
        ([*read, "--prompt", "x", "-o", str(tmp_path / "no" / "page.html")], "expected a file that can be written"),
        ([*read, "--prompt", "x", "-o", "page.html", "--json"], "expected --json or --output, got both"),
        ([*read, "--prompt", "x", "--all-entries"], "expected --all-entries with --json, got it without"),
        (["--model", "nowhere", "--read", "nothing.txt", "--prompt", "x"], "no file or folder 'nothing.txt'"),
        ([*read], "--prompt"),
    ]:
        assert message in failed(given, capsys)
    assert Path(os.devnull).is_char_device()


def test_a_prompt_that_is_no_one_segment_is_refused_before_anything_is_read(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(make_run(tmp_path / "run")), "--read", str(notes / "fact.txt"), "--json", "--prompt"]
    assert "expected at most 32 tokens of prompt, got 33 (--read longer texts)" in failed([*given, "x" * 33], capsys)
    main(["explain", *given, "x" * 32])
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 32


def test_another_models_memory_and_rows_that_are_not_there_are_refused(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = (str(make_run(tmp_path / f"run{seed}", seed=seed)) for seed in range(2))
    library, page = tmp_path / "library", tmp_path / "page.html"
    main(["memory", "build", str(library), str(notes), "--model", run])
    given = ["--memory", str(library), "--prompt", "x", "-o", str(page)]
    assert "written by other weights" in failed(["--model", other, *given], capsys)
    assert "expected a row from 0 to 0, got 1" in failed(["--model", run, *given, "--row", "1"], capsys)
    assert not page.exists()


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> None:
    attach_spans = pytest.importorskip("memorizing_transformers_pytorch.huggingface.attach_spans")
    monkeypatch.setattr(attach_spans, "best_head", lambda *_: attach_spans.Head(0, 0, 1.0))


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("content", ["kv", "tokens"])
def test_a_memory_of_passages_explains_what_is_written_after_a_prompt_and_what_is_answered(
    content: str, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder that is known for what it is and stays as it is, or from files that are read now."""
    hub, library, page = str(make_hub_model(tmp_path / "hub")), tmp_path / "library", tmp_path / "page.html"
    main(["memory", "build", str(library), str(notes), "--model", hub, "--content", content])
    before = contents(library)
    given = ["explain", "--model", hub, "--memory", str(library)]
    capsys.readouterr()
    main([*given, "--prompt", "the question", "--max-new-tokens", "5", "--json", "--contribution", "ablate"])
    found = json.loads(capsys.readouterr().out)
    assert [each["loss"] is None for each in found["tokens"]] == [True] * 12 + [False] * 5
    assert [(each["first"], each["last"]) for each in found["blocks"]] == [(12, 16)]
    assert {Path(each["title"]).name for each in found["passages"]} <= {"fact.txt", "other.txt"}
    assert all(each["contribution"] is not None and each["score"] >= 0 for each in found["passages"])
    main([*given, "--question", "What is the answer?", "--max-new-tokens", "3", "-o", str(page)])
    assert "written: " in capsys.readouterr().out
    assert "Which passages stood before which tokens" in page.read_text()
    main([*given, "--prompt", "the question of " * 10, "--max-new-tokens", "0", "--json"])
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert [(each["first"], each["last"], bool(each["passages"])) for each in blocks] == [
        (0, 127, False),
        (128, 159, True),
    ]
    assert contents(library) == before
    read = ["explain", "--model", hub, "--read", str(notes), "--max-new-tokens", "2", "--json"]
    for more in (["--prompt", "the question"], ["--question", "What?"]):
        main([*read, *more])
        assert json.loads(capsys.readouterr().out)["blocks"][0]["passages"]


def test_what_a_memory_of_tokens_cannot_explain_is_refused(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = [
        "--model",
        str(make_run(tmp_path / "run")),
        "--read",
        str(notes / "fact.txt"),
        "-o",
        str(tmp_path / "page.html"),
    ]
    for arguments, message in (
        ([*read, "--prompt", "x", "--question", "y"], "give either --prompt or --question"),
        ([*read, "--question", " "], "expected a text to explain"),
        ([*read, "--prompt", "x", "--max-new-tokens", "3"], "with a memory of spans"),
        ([*read, "--prompt", "x", "--max-new-tokens", "-3"], "must be 0 or more"),
    ):
        assert message in failed(arguments, capsys)
