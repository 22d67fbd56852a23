"""The command line, from training to writing, on a corpus of a few small files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memorizing_transformers_pytorch.cli import main
from memorizing_transformers_pytorch.data.corpora import split_by_name, standard_library

TINY = ["--steps", "6", "--rows", "2", "--segment-length", "16", "--num-tokens", "300", "--dim", "16", "--depth", "2"]
TINY += [
    "--max-knn-memories",
    "64",
    "--held-out-tokens",
    "48",
    "--validate-every",
    "3",
    "--sample-tokens",
    "5",
    "--memory-share",
    "0.2",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = "\n".join(f"def function_{number}_{i}(argument):\n    return argument + {i}" for i in range(20))
        (folder / f"module{number}.py").write_text(lines)
    assert len(split_by_name(standard_library(folder))[1]) >= 2
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "tiny"
    main(["train", "--corpus", str(corpus), "--output", str(output), *TINY])
    return output


def test_a_run_keeps_model_tokenizer_metrics_results_plot_and_sample(run: Path) -> None:
    written = {"model.safetensors", "tokenizer.json", "options.json", "metrics.jsonl", "results.json"}
    assert {path.name for path in run.iterdir()} == written | {"curves.png", "sample.txt"}
    results = json.loads((run / "results.json").read_text())
    assert set(results["loss"]) == {"off", "on", "other", "shuffled"}
    assert [validation["step"] for validation in results["validations"]] == [3, 5, 6]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["number"] for record in records if "number" in record] == [1, 2, 3, 4, 5, 6]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_leaves_the_first_alone(run: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "results.json").read_text()
    main(["train", "--corpus", str(corpus), "--output", str(run), *TINY])
    assert (run / "results.json").read_text() == before
    assert json.loads((run.with_name("tiny-2") / "results.json").read_text())["loss"] == json.loads(before)["loss"]
    printed = capsys.readouterr().out
    assert "tiny-2" in printed
    assert all(label in printed for label in ("memory off", "memory on", "another document's", "values shuffled"))
    assert "from here on the model writes" in printed


def test_a_run_goes_on_writing_the_same_text_for_the_same_seed(
    run: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(run), "--read", str(corpus / "module1.py"), "--prompt", "def f"]
    arguments += ["--max-new-tokens", "20", "--temperature", "1"]
    written = []
    for seed in ("1", "1", "2"):
        main([*arguments, "--seed", seed])
        written.append(capsys.readouterr().out)
    assert written[0].startswith("def f")
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--steps", "0"], "expected steps to be at least 1, got 0"),
        (["train", "--corpus", "nowhere"], "expected Python files in 'nowhere', got none"),
        (["train", "--learning-rate", "-1"], "expected learning_rate to be above 0, got -1.0"),
        (
            ["generate", "nowhere", "--prompt", "x"],
            "expected the folder of a run, got 'nowhere'",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_continue_is_bad_input(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (([], "got none"), (["--read", "nowhere"], "does not exist")):
        with pytest.raises(SystemExit) as stopped:
            main(["generate", str(run), *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "generate"])
def test_help_tells_the_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--segment-length" in capsys.readouterr().out
