"""Ctrl-C and SIGTERM stop a run between two steps, with a checkpoint."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers_pytorch.cli import main
from memorizing_transformers_pytorch.training import loop
from memorizing_transformers_pytorch.training.checkpoint import last_of
from memorizing_transformers_pytorch.training.loop import train
from memorizing_transformers_pytorch.training.run import config_of
from memorizing_transformers_pytorch.training.trainer import Step, Trainer
from memorizing_transformers_pytorch.utils.interrupts import Interrupted, StopRequest, stopping_on_signals

from .helpers import command, losses_of, make_config, start, write_corpus
from .test_resume import wait_for

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class SecondSignal(Exception):
    pass


@pytest.fixture(autouse=True)
def _own_handlers() -> Any:
    def second(number: int, frame: Any) -> None:
        raise SecondSignal(number)

    before = {number: signal.signal(number, second) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take most of the time, and are not what is tested here."""
    monkeypatch.setattr(loop, "plots_are_possible", lambda: False)


def signalled(number: signal.Signals, at: int) -> Callable[[Trainer], Step]:
    """A step that gets a signal when so many have been done."""
    step = Trainer.step

    def interrupted(self: Trainer) -> Step:
        if self.progress.step == at:
            os.kill(os.getpid(), number)
        return step(self)

    return interrupted


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_a_second_one_acts_as_before(number: signal.Signals) -> None:
    with stopping_on_signals() as wish:
        assert wish.signal is None
        os.kill(os.getpid(), number)
        assert wish.signal == number
        with pytest.raises(SecondSignal):
            os.kill(os.getpid(), number)


def test_a_launcher_that_sends_one_signal_after_the_other_lets_the_run_save() -> None:
    with stopping_on_signals() as wish:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert wish.signal == signal.SIGINT


def test_afterwards_signals_act_as_before() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), stopping_on_signals():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_in_another_thread_signals_are_left_alone() -> None:
    wishes: list[StopRequest] = []

    def run() -> None:
        with stopping_on_signals() as wish:
            wishes.append(wish)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert wishes[0].signal is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_within_a_step_saves_after_it_and_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    write_corpus(tmp_path / "corpus")
    config, run = make_config(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled(number, at=4))
        with pytest.raises(Interrupted) as raised:
            train(config, run)
    assert raised.value.signal == number
    assert last_of(run) == run / "checkpoints" / "step-5"
    assert f"interrupted at step 5; saved in {last_of(run)}; continue with --resume" in str(raised.value)
    train(config, run, resume=True)
    train(config, tmp_path / "whole")
    assert losses_of(run) == losses_of(tmp_path / "whole")


def test_a_second_signal_ends_a_run_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus")

    def hanging(self: Trainer) -> Step:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one should have ended it")

    monkeypatch.setattr(Trainer, "step", hanging)
    with pytest.raises(SecondSignal):
        train(make_config(tmp_path), tmp_path / "run")
    assert last_of(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-0"


def test_an_interrupt_whose_checkpoint_cannot_be_written_names_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus")
    write = loop.write_checkpoint

    def full(trainer: Trainer, *arguments: Any) -> Path:
        if trainer.progress.step > 0:
            raise loop.SaveError("could not write it; the last good checkpoint is step-0")
        os.kill(os.getpid(), signal.SIGTERM)
        return write(trainer, *arguments)

    monkeypatch.setattr(loop, "write_checkpoint", full)
    with pytest.raises(loop.SaveError, match="step-0"):
        train(make_config(tmp_path), tmp_path / "run")


@pytest.mark.slow
def test_on_the_command_line_the_exit_code_tells_the_signal_and_the_message_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One comes from within, as from a thread; one from another process."""
    write_corpus(tmp_path / "corpus")
    config, run = make_config(tmp_path, training={"steps": 100_000}), tmp_path / "run"

    def check(code: object, number: signal.Signals, errors: str) -> None:
        assert code == 128 + number
        assert re.search(r"interrupted at step (\d+); saved in (\S+); continue with --resume", errors)
        assert f"saved in {last_of(run)};" in errors.splitlines()[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled(signal.SIGINT, at=4))
        with pytest.raises(SystemExit) as stopped:
            main(command(config, run))
    check(stopped.value.code, signal.SIGINT, capsys.readouterr().err)
    process = start(command(config, run, "--resume"))
    wait_for(run, len(losses_of(run)) + 1, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    check(process.returncode, signal.SIGTERM, errors)
    steps = int(last_of(run).name.removeprefix("step-"))
    assert [step for step, _ in losses_of(run)] == list(range(1, steps + 1))
    assert config_of(run).training.steps == 100_000
