"""The command line, from training to writing, on a corpus of a few small files."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import memorizing_transformers_pytorch
from memorizing_transformers_pytorch.cli import COMMANDS, main
from memorizing_transformers_pytorch.cli.train import draw
from memorizing_transformers_pytorch.training.metrics import read_metrics
from memorizing_transformers_pytorch.training.presets import RUN_PRESETS
from memorizing_transformers_pytorch.training.run import load_run

TINY = """
device: cpu
model: {num_tokens: 280, dim: 16, depth: 2, dim_head: 8, heads: 2, max_knn_memories: 64}
memory: {last_share: 0.5, growth: [[0, 32], [5, 64]]}
training: {steps: 6, rows: 2, segment_length: 16, validate_every: 3, checkpoint_every: 2, log_every: 1}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        words = [f"word{number}{letter}" for letter in "abcd"]
        lines = "\n".join(f"def {a}_{b}(argument):\n    return {b} + {a}" for a in words for b in words)
        (folder / f"module{number}.py").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def arguments(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "tiny.yaml").write_text(TINY)
    source = ["--data.source", str(corpus), "--data.cache", str(folder / "cache"), "--data.valid", "0.2"]
    return ["train", "--config", str(folder / "tiny.yaml"), *source, "--sample-tokens", "5"]


@pytest.fixture(scope="module")
def run(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "tiny"
    main([*arguments, "--output", str(output)])
    return output


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command prints which exits with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "documents/s]" not in line]
    assert len(lines) == 1
    return lines[0]


def test_a_run_keeps_what_it_is_and_what_it_is_worth(run: Path) -> None:
    written = {"config.yaml", "tokenizer.json", "checkpoints", "metrics.jsonl", "metrics.png", "evaluation"}
    assert {path.name for path in run.iterdir()} == written | {"sample.txt", "report.html"}
    report = (run / "report.html").read_text()
    for words in (
        "Attention on the memory, by head",
        "By size of the memory",
        "By position in the document",
        "held out",
    ):
        assert words in report
    assert {path.suffix for path in (run / "evaluation").iterdir()} == {".json", ".md", ".png"}
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "validation" in record] == [3, 6]
    assert [list(record["memory"]["layer 2"]) for record in records if "memory" in record][-1] == [
        "temperature",
        "mass",
        "recall",
        "age",
    ]


def test_a_report_that_cannot_be_drawn_is_no_reason_for_a_training_to_fail(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no ink")

    before = (run / "report.html").read_bytes()
    monkeypatch.setattr("memorizing_transformers_pytorch.cli.train.write_run_page", fail)
    draw(load_run(run), None)
    assert capsys.readouterr().err == "no report was written: RuntimeError: no ink\n"
    assert (run / "report.html").read_bytes() == before


def test_flags_lie_over_the_file_and_the_file_over_the_preset(run: Path, corpus: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["source"] == str(corpus)
    assert config["training"]["steps"] == 6
    assert config["model"]["short_conv"] == RUN_PRESETS["small"]["model"]["short_conv"]


def test_evaluation_tells_each_memory_size_and_control(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run), "--memory", "0,8,64", "--output", str(run.with_name("evaluated"))])
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("another document's memory", "values shuffled", "random keys"))
    written = json.loads((run.with_name("evaluated") / "evaluation.json").read_text())
    assert {"off", "8", "64"} < set(written["modes"])


def test_an_existing_run_is_left_alone_and_overwritten_only_when_asked(
    run: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert "which exists (--resume or --overwrite)" in failed([*arguments, "--output", str(run)], capsys)
    assert (run / "metrics.jsonl").read_bytes() == before
    other = tmp_path / "run"
    shutil.copytree(run, other)
    quick = ["--no-evaluate", "--sample-tokens", "0", "--training.steps", "1"]
    main([*arguments, "--output", str(other), *quick, "--overwrite"])
    assert [record["step"] for record in read_metrics(other / "metrics.jsonl") if "loss" in record] == [1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "expected a run to overwrite" in failed(
        [*arguments, "--output", str(tmp_path / "mine"), "--overwrite"], capsys
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_without_a_name_the_next_free_one_is_taken(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "small").mkdir(parents=True)
    main([*arguments, "--training.steps", "1", "--no-evaluate", "--sample-tokens", "0"])
    assert (tmp_path / "runs" / "small-2" / "metrics.jsonl").is_file()
    assert list((tmp_path / "runs" / "small").iterdir()) == []


def test_resuming_needs_only_the_folder_and_may_go_further(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run"
    quick = ["--output", str(other), "--no-evaluate", "--sample-tokens", "0"]
    shutil.copytree(run, other)
    main(["train", "--resume", *quick, "--training.steps", "8"])
    steps = [record["step"] for record in read_metrics(other / "metrics.jsonl") if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    line = failed(["train", "--resume", *quick, "--optimizer.learning-rate", "1"], capsys)
    assert "optimizer.learning_rate 0.004 (got 1.0)" in line


def test_a_run_goes_on_writing_the_same_text_for_the_same_seed(
    run: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", str(run), "--read", str(corpus / "module1.py"), str(corpus / "module2.py")]
    given += ["--prompt", "def f", "--max-new-tokens", "20", "--temperature", "1"]
    written = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        main([*given, "--seed", seed])
        written.append(capsys.readouterr().out)
    assert written[0].startswith("def f")
    assert written[0] == written[1] != written[2]


def test_standard_input_can_be_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def word1a_word1b(argument):\n" * 9)))
    main(["generate", str(run), "--read", "-", "--max-new-tokens", "3"])
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["nonsense"],
            "expected a command among train, evaluate, generate, ask, chat, explain, memory, explore, export, "
            "got 'nonsense'",
        ),
        (["train", "--training.steps", "0"], "expected steps to be at least 1, got 0"),
        (["train", "--training.stepz", "1"], "--training.stepz"),
        (["train", "--optimizer.learning-rate", "-1"], "expected learning_rate to be above 0, got -1.0"),
        (["train", "--preset", "huge"], "expected a preset among small, enwik8, paper-200m, paper-1b, paper-8b"),
        (["train", "--config", "nowhere.yaml"], "expected a YAML file, got 'nowhere.yaml'"),
        (["train", "--data.source", "nowhere"], "got 'nowhere'"),
        (["train", "--resume"], "expected --resume with --output RUN"),
        (["train", "--resume", "--output", "x", "--overwrite"], "expected --resume with --output RUN"),
        (["train", "--preset"], "--preset"),
        (["train", "--resume", "--output", "nowhere"], "'nowhere' is not a training run"),
        (["evaluate", "nowhere"], "'nowhere' is not a training run"),
        (["evaluate", "nowhere", "--memory", "many"], "expected memory sizes such as 0,512,2048, got 'many'"),
        (["explore", "nowhere"], "expected the folder of a run or a memory, got 'nowhere'"),
        (["explore", "--port", "0"], "expected a port from 1 to 65535, got 0"),
        (["generate", "nowhere", "--prompt", "x"], "'nowhere' is not a training run"),
        (["generate", "nowhere", "--read", "nothing.txt"], "expected a text file to read, got 'nothing.txt'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    given: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failed(given, capsys)
    assert list(tmp_path.iterdir()) == []


def test_text_that_cannot_be_trained_on_is_refused_before_the_run_begins(
    arguments: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "image").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a").write_text("a")
    (tmp_path / "rows.jsonl").write_text('{"body": "text"}\n')
    output = ["--output", str(tmp_path / "run")]
    for change, message in (
        (["--data.source", str(tmp_path / "empty")], "got none"),
        (["--data.source", str(tmp_path / "binary")], "image"),
        (["--data.source", str(tmp_path / "short")], "expected"),
        (["--data.source", str(tmp_path / "rows.jsonl")], "body"),
        (["--training.rows", "90"], "expected at most"),
        (["--data.tokenizer", "bytes"], "expected a tokenizer of 280 tokens, got one of 256"),
        (["--model.num-tokens", "90000"], "expected text for 90,000 tokens"),
    ):
        assert message in failed([*arguments, *output, *change], capsys)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    special = {
        "export": "--checkpoint",
        "memory": "compact",
        "explain": "--contribution",
        "explore": "--read-only",
        "ask": "--passages",
        "chat": "--passages",
    }
    assert special.get(command, "--seed") in capsys.readouterr().out


def test_the_train_script_is_the_enwik8_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script = str(Path(__file__).parents[2] / "train.py")
    monkeypatch.setattr(sys, "argv", [script, "--data.source", "enwik8:nowhere", "--output", "run"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("memorizing-transformers: expected enwik8 or enwik8.zip, got 'nowhere'")


NOTHING_TO_RUN = [["--help"], ["--version"], ["nonsense"], [], ["memory"], ["memory", "info"], ["memory", "nonsense"]]
HELP = [[name, "--help"] for name in COMMANDS] + [["memory", "build", "--help"]]
MISTAKES = [[name, "--no-such-option"] for name in COMMANDS]


@pytest.mark.parametrize("arguments", NOTHING_TO_RUN + HELP + MISTAKES, ids=" ".join)
def test_what_needs_no_model_does_not_import_torch(arguments: list[str]) -> None:
    program = "import sys\nfrom memorizing_transformers_pytorch.cli import main\n"
    program += f"try: main({arguments})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "memorizing-transformers" in result.stdout + result.stderr


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    assert all(getattr(memorizing_transformers_pytorch, name) for name in memorizing_transformers_pytorch.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = memorizing_transformers_pytorch.nonsense
