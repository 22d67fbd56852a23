"""Two processes train as one does. Each launch costs seconds, so one of them goes through all the runs of `JOBS`."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from memorizing_transformers_pytorch import cli
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.training import checkpoint, loop
from memorizing_transformers_pytorch.training import run as folders
from memorizing_transformers_pytorch.training.checkpoint import SaveError, checkpoints_of, last_of
from memorizing_transformers_pytorch.training.config import RunConfig
from memorizing_transformers_pytorch.training.loop import train
from memorizing_transformers_pytorch.training.metrics import read_metrics
from memorizing_transformers_pytorch.training.run import CONFIG, METRICS, load_run
from memorizing_transformers_pytorch.training.trainer import Step, Trainer
from memorizing_transformers_pytorch.utils.interrupts import Interrupted

from .helpers import command, losses_of, make_config, same, start, write_corpus

ROOT = Path(__file__).parents[2]
OPTIONS = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCHER = ("-m", "accelerate.commands.launch", *OPTIONS.split())  # does what torchrun does, and more

CONFIGS: dict[str, dict[str, Any]] = {
    "accumulated": {
        "model": {"xl_max_memories": 5, "combine": "gate"},
        "training": {"segments": 2, "row_groups": 2, "rows": 8, "validate_every": 4},
    },
    "packed": {
        "model": {"short_conv": 2, "memorizing_layers": (1, 2)},
        "data": {"pack": True},
        "optimizer": {"ema_decay": 0.8},
        "memory": {"from_step": 4, "growth": ((0, 4), (8, 21))},
    },
    # One document is longer than a segment: whoever does not read it finds nothing in its memories.
    "lonely": {"model": {"combine": "gate"}, "training": {"segment_length": 100, "steps": 24}},
    "dropout": {"model": {"ff_dropout": 0.2, "xl_max_memories": 5}, "memory": {"dropout": 0.4}},
    "bf16": {"training": {"precision": "bf16"}},
}


def config_of(name: str, folder: Path) -> RunConfig:
    return make_config(folder, **CONFIGS[name])


# What each of the two processes does


class Killed(BaseException):
    pass


def at_step(number: int, action: Callable[[], None]) -> Any:
    """Inside, this is done after the step with this number (from 1)."""
    step = Trainer.step

    def acting(self: Trainer) -> Step:
        done = step(self)
        if done.number == number:
            action()
        return done

    return mock.patch.object(Trainer, "step", acting)


def kill() -> None:
    raise Killed


def straight(name: str, folder: Path, rank: int) -> object:
    """A run from beginning to end; which steps found something in the memory here."""
    found: list[bool] = []
    look_up = KNNMemory.look_up

    def noted(self: KNNMemory, *arguments: Any, **named: Any) -> Any:
        lookup = look_up(self, *arguments, **named)
        if torch.is_grad_enabled():
            found.append(bool(lookup.mask.any()))
        return lookup

    with mock.patch.object(KNNMemory, "look_up", noted):
        train(config_of(name, folder), folder / name)
    return found


def resumed(folder: Path, rank: int) -> None:
    config, run = config_of("dropout", folder), folder / "resumed"
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, checkpoint_every=5))
    for at in (7, 9):
        try:
            with at_step(at, kill):
                train(config, run, resume=at == 9)
        except Killed:
            pass
    train(config, run, resume=True)


def interrupted(folder: Path, rank: int) -> str:
    """Only one of the processes gets the signal."""
    number = signal.SIGTERM if rank == 1 else 0
    try:
        with at_step(6, partial(os.kill, os.getpid(), number)):
            train(config_of("dropout", folder), folder / "interrupted")
    except Interrupted as error:
        return str(error)
    return ""


def overwritten(folder: Path, rank: int) -> None:
    """The main process takes its time: until it is done the others still see the old run."""
    empty = folders._empty

    def slow(run: Path) -> None:
        time.sleep(0.3)
        empty(run)

    with mock.patch.object(folders, "_empty", slow):
        train(config_of("dropout", folder), folder / "interrupted", overwrite=True)


def full_disk(folder: Path, rank: int) -> str:
    """Only one of the processes cannot write its part of a later checkpoint."""
    save = checkpoint.save_file

    def failing(tensors: Any, path: Path) -> None:
        if "step-12" in str(path) and path.name == "process-1.safetensors":
            raise OSError("No space left on device")
        save(tensors, path)

    try:
        with mock.patch.object(checkpoint, "save_file", failing):
            train(config_of("dropout", folder), folder / "full")
    except SaveError as error:
        return str(error)
    return ""


def not_finite(folder: Path, rank: int) -> None:
    """Only one of the processes has a loss that is none."""
    config = config_of("accumulated", folder)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, on_nan="skip"))
    loss = Trainer._loss

    def broken(self: Trainer, *arguments: Any) -> Any:
        found = loss(self, *arguments)
        return found * torch.nan if rank == 1 and self.progress.step == 3 and found is not None else found

    with mock.patch.object(Trainer, "_loss", broken):
        train(config, folder / "not finite")


def on_the_command_line(folder: Path, rank: int) -> None:
    """What `accelerate launch -m memorizing_transformers_pytorch train ...` does."""
    cli.main(command(config_of("dropout", folder), folder / "command"))


JOBS: dict[str, Callable[[Path, int], object]] = {
    **{name: partial(straight, name) for name in CONFIGS},
    "resumed": resumed,
    "interrupted": interrupted,
    "overwritten": overwritten,
    "full": full_disk,
    "not finite": not_finite,
    "command": on_the_command_line,
}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    with mock.patch.object(loop, "plots_are_possible", return_value=False):
        results = {name: job(folder, rank) for name, job in JOBS.items()}
    (folder / f"results-{rank}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))


# What is to be seen afterwards


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take most of the time, and are not what is tested here."""
    monkeypatch.setattr(loop, "plots_are_possible", lambda: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all the runs of two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    write_corpus(folder / "corpus")
    process = start([str(folder)], LAUNCHER, module="tests.training.test_distributed", cwd=ROOT)
    try:
        _, errors = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return folder


def results_of(folder: Path, job: str) -> list[Any]:
    return [json.loads((folder / f"results-{rank}.json").read_text())[job] for rank in (0, 1)]


def validations_of(run: Path) -> list[dict[str, float]]:
    return [record["validation"] for record in read_metrics(run / METRICS) if "validation" in record]


def alone(name: str, folder: Path, tmp_path: Path) -> Path:
    return train(config_of(name, folder), tmp_path / name)


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]


@pytest.mark.parametrize("name", ["accumulated", "packed", "lonely"])
def test_losses_are_those_of_one_process_with_the_same_rows(folder: Path, tmp_path: Path, name: str) -> None:
    run = alone(name, folder, tmp_path)
    together, apart = losses_of(folder / name), losses_of(run)
    assert [step for step, _ in together] == [step for step, _ in apart]  # and so written once
    assert [loss for _, loss in together] == pytest.approx([loss for _, loss in apart], rel=1e-4)
    for field in ("tokens", "learning_rate"):
        assert [r.get(field) for r in read_metrics(folder / name / METRICS)] == [
            r.get(field) for r in read_metrics(run / METRICS)
        ]
    validations = [
        [r["validation"] for r in read_metrics(at / METRICS) if "validation" in r] for at in (folder / name, run)
    ]
    for both in zip(*validations, strict=True):
        assert both[0] == pytest.approx(both[1], rel=1e-4)
    for ours, theirs in zip(load_run(folder / name).model.parameters(), load_run(run).model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_memories_of_one_process_may_be_empty(folder: Path) -> None:
    found = results_of(folder, "lonely")
    assert len(found[0]) == len(found[1]) == 24
    assert any(one != other for one, other in zip(*found, strict=True))


def test_each_process_keeps_rows_and_random_numbers_of_its_own(folder: Path) -> None:
    last = last_of(folder / "dropout")
    assert last is not None
    parts = [checkpoint.read_weights(last / f"process-{rank}.safetensors") for rank in (0, 1)]
    for name in ("memories.0.origins", "random.cpu"):
        assert parts[0][name].tolist() != parts[1][name].tolist()


def test_a_run_of_two_processes_goes_on_exactly(folder: Path) -> None:
    assert losses_of(folder / "resumed") == losses_of(folder / "dropout")
    assert len(losses_of(folder / "resumed")) == 12
    assert same(*(load_run(folder / name).model.state_dict() for name in ("resumed", "dropout")))


def test_a_run_of_two_processes_is_refused_by_one(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "dropout", tmp_path / "run")
    with pytest.raises(ValueError, match=r"expected 2 processes, as .*step-12 has, got 1"):
        train(config_of("dropout", folder), tmp_path / "run", resume=True)


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(folder: Path) -> None:
    for message in results_of(folder, "interrupted"):
        assert message.startswith("interrupted at step 6; saved in ")


def test_a_run_of_two_processes_can_be_overwritten(folder: Path) -> None:
    assert losses_of(folder / "interrupted") == losses_of(folder / "dropout")


def test_a_process_that_cannot_write_fails_the_checkpoint_of_both(folder: Path) -> None:
    reasons = ("another process failed", "No space left on device")
    for message, reason in zip(results_of(folder, "full"), reasons, strict=True):
        assert message == (
            f"could not write {folder / 'full' / 'checkpoints' / 'step-12'}: {reason}; "
            f"the last good checkpoint is {folder / 'full' / 'checkpoints' / 'step-0'}"
        )
    assert list((folder / "full" / "checkpoints").iterdir()) == [folder / "full" / "checkpoints" / "step-0"]


def test_a_loss_of_one_process_that_is_not_finite_is_skipped_by_both(folder: Path) -> None:
    losses = losses_of(folder / "not finite")
    assert losses[:3] == losses_of(folder / "accumulated")[:3]
    assert [step for step, loss in losses if loss is None] == [4]
    assert len(losses) == 12


def test_bf16_trains_after_other_precisions(folder: Path) -> None:
    assert len(losses_of(folder / "bf16")) == 12


def test_accelerate_launches_the_command_line_on_two_processes(folder: Path) -> None:
    run = folder / "command"
    assert losses_of(run) == losses_of(folder / "dropout")
    assert (run / CONFIG).is_file()
    assert list(checkpoints_of(run)) == [12]
