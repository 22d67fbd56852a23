"""A run that was broken off, anywhere and any number of times, goes on as if it had not been."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers_pytorch.cli import main
from memorizing_transformers_pytorch.training import loop
from memorizing_transformers_pytorch.training.checkpoint import checkpoints_of, last_of, read_state
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.loop import train
from memorizing_transformers_pytorch.training.metrics import read_metrics
from memorizing_transformers_pytorch.training.run import METRICS, config_of, load_run
from memorizing_transformers_pytorch.training.trainer import Step, Trainer

from .helpers import command, losses_of, make_config, same, write_corpus

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "xl, packed": {"model": {"xl_max_memories": 11}, "data": {"pack": True}, "training": {"validate_every": 3}},
    "accumulated": {"model": {"xl_max_memories": 5, "short_conv": 2}, "training": {"segments": 2, "row_groups": 2}},
    "dropout, adafactor": {
        "model": {"ff_dropout": 0.2, "attn_dropout": 0.1, "combine": "gate"},
        "optimizer": {"name": "adafactor", "schedule": "rsqrt"},
        "memory": {"dropout": 0.4},
    },
    "average, growth": {
        "optimizer": {"ema_decay": 0.8},
        "memory": {"from_step": 2, "growth": ((0, 3), (5, 9), (8, 21))},
        "training": {"validate_every": 4},
    },
    "loss, fp16": {
        "optimizer": {"learning_rate": 0.2, "decay_share": 0.4},
        "memory": {"from_loss": 5.4, "scope": "step"},
        "training": {"precision": "fp16", "segments": 2},
    },
    "bf16": {"model": {"memory_dtype": "bfloat16", "xl_max_memories": 5}, "training": {"precision": "bf16"}},
}


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take most of the time, and are not what is tested here."""
    monkeypatch.setattr(loop, "plots_are_possible", lambda: False)


class Killed(BaseException):
    pass


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def broken_off(config: RunConfig, run: Path, at: int, monkeypatch: pytest.MonkeyPatch, **options: bool) -> None:
    """Train until the step with this number (from 1) has been done, but nothing after it."""
    step = Trainer.step

    def killing(self: Trainer) -> Step:
        done = step(self)
        if done.number == at:
            raise Killed
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killing)
        with pytest.raises(Killed):
            train(config, run, **options)


@pytest.mark.usefixtures("corpus")
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_weights_are_those_of_a_run_that_was_not_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes = CONFIGS[name]
    training = {"steps": 11, "checkpoint_every": 4} | changes.get("training", {})
    config = make_config(tmp_path, **changes | {"training": training})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    broken_off(config, parts, 1, monkeypatch)
    broken_off(config, parts, 6, monkeypatch, resume=True)
    broken_off(config, parts, 8, monkeypatch, resume=True)
    train(config, parts, resume=True)
    assert [step for step, _ in losses_of(whole)] == list(range(1, 12))
    assert losses_of(parts) == losses_of(whole)
    for which in ("last", "best"):
        runs = [load_run(run, which) for run in (whole, parts)]
        assert runs[0].step == runs[1].step
        assert same(*(run.model.state_dict() for run in runs))
    assert set(checkpoints_of(parts)) == set(checkpoints_of(whole)) == {11, load_run(whole, "best").step}


@pytest.mark.usefixtures("corpus")
def test_validation_changes_nothing(tmp_path: Path) -> None:
    found = []
    for every in (1, 5, 1000):
        changes = {"model": {"xl_max_memories": 5, "ff_dropout": 0.2}, "memory": {"dropout": 0.3}}
        config = make_config(tmp_path, **changes, training={"validate_every": every, "log_every": every})
        train(config, tmp_path / str(every))
        validations = [r["step"] for r in read_metrics(tmp_path / str(every) / METRICS) if "validation" in r]
        assert validations == sorted({*range(every, 13, every), 12})
        found.append(losses_of(tmp_path / str(every)))
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("corpus")
def test_a_run_can_be_made_longer_and_remembers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(steps: int) -> RunConfig:
        return make_config(tmp_path, optimizer={"schedule": "constant"}, training={"steps": steps})

    train(config(9), tmp_path / "long")
    train(config(4), tmp_path / "run")
    train(config(4), tmp_path / "run", resume=True)  # nothing is left to do
    assert len(losses_of(tmp_path / "run")) == 4
    broken_off(config(9), tmp_path / "run", 6, monkeypatch, resume=True)
    assert config_of(tmp_path / "run").training.steps == 9
    train(config_of(tmp_path / "run"), tmp_path / "run", resume=True)
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "long")


@pytest.mark.usefixtures("corpus")
def test_the_best_checkpoint_survives_a_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, optimizer={"learning_rate": 3.0}, training={"validate_every": 2, "steps": 14})
    train(config, tmp_path / "whole")
    broken_off(config, tmp_path / "parts", 9, monkeypatch)
    train(config, tmp_path / "parts", resume=True)
    best = [read_state(last_of(tmp_path / name))["best"] for name in ("whole", "parts")]
    assert best[0] == best[1]
    assert best[0]["step"] < 14
    validations = [r for r in read_metrics(tmp_path / "whole" / METRICS) if "validation" in r]
    losses = {record["step"]: record["validation"]["21"] for record in validations}
    assert best[0] == {"step": min(losses, key=losses.__getitem__), "loss": min(losses.values())}
    assert set(checkpoints_of(tmp_path / "parts")) == {best[0]["step"], 14}


@pytest.mark.slow
@pytest.mark.usefixtures("corpus")
def test_killed_with_signal_9_at_three_moments_a_run_goes_on_exactly(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        model={"xl_max_memories": 5, "ff_dropout": 0.1},
        optimizer={"ema_decay": 0.9},
        memory={"growth": ((0, 5), (30, 21))},
        training={"steps": 70, "checkpoint_every": 4, "validate_every": 20},
    )
    run = tmp_path / "run"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch._dynamo", "memorizing_transformers_pytorch.cli.train"])  # read them once
    for at in (1, 20, 40):
        process = processes.Process(target=main, args=(command(config, run, *(["--resume"] if run.exists() else [])),))
        process.start()
        wait_for(run, at, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    train(config_of(run), run, resume=True)
    train(config, tmp_path / "whole")
    assert losses_of(run) == losses_of(tmp_path / "whole")
    assert len(losses_of(run)) == 70
    assert same(*(load_run(tmp_path / name).model.state_dict() for name in ("run", "whole")))


def wait_for(run: Path, step: int, process: Any) -> None:
    """Until a running process has written down this step."""
    while not any(record["step"] >= step for record in read_metrics(run / METRICS)):
        ended = process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
        assert ended is None
        time.sleep(0.01)
