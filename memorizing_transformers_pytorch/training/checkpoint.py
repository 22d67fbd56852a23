"""Checkpoints of a training run, from which it goes on exactly: weights, optimiser, place in the data, memories.

A checkpoint is a folder `checkpoints/step-N` of safetensors files and one JSON file; nothing is pickled. It is written
under another name, brought to the disk (fsync) and then renamed, and gets another name before it is removed: a folder
of that name is complete, whatever happened. (So is `step-N.replaced`, there for a moment when step N is written again.)

    model.safetensors       weights, with the configuration of the model
    average.safetensors     their moving average, if one is kept
    optimizer.safetensors   the tensors of the optimiser
    process-R.safetensors   what process R alone has: memories, state of its rows, random numbers
    state.json              everything else; the number of processes
    checksums.json          of all these; what is read is checked
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from memorizing_transformers_pytorch.model.checkpoint import load_weights, read_weights, save_checkpoint
from memorizing_transformers_pytorch.training.state import (
    load_own_state,
    load_shared_state,
    own_state,
    shared_state,
)
from memorizing_transformers_pytorch.training.trainer import Trainer
from memorizing_transformers_pytorch.utils.durable import SaveError, sync, sync_folder, verify, write_checksums
from memorizing_transformers_pytorch.utils.plain_json import read_object

MODEL, AVERAGE, OPTIMIZER, STATE = "model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"


_NAME = re.compile(r"step-(\d+)(\.replaced)?")


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by their steps, oldest first."""
    found = [(path, match) for path in (run / "checkpoints").glob("step-*") if (match := _NAME.fullmatch(path.name))]
    found.sort(key=lambda each: (int(each[1][1]), each[1][2] is None))
    return {int(match[1]): path for path, match in found}


def last_of(run: Path) -> Path | None:
    """The last complete checkpoint of a run, if it has one."""
    return next(reversed(checkpoints_of(run).values()), None)


def last_good(run: Path) -> str:
    """The same in words, for messages."""
    last = last_of(run)
    return "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"


def write_checkpoint(trainer: Trainer, run: Path, extra: dict[str, Any]) -> Path:
    """Write a checkpoint of where the trainer stands; every process calls this. `extra` is kept in state.json.

    Raises SaveError, which names the last good checkpoint, where it cannot be written.
    """
    main = trainer.accelerator.is_main_process
    folder = run / "checkpoints" / f"step-{trainer.progress.step}"
    aside = folder.with_name(f".{folder.name}.incomplete")
    stages: list[tuple[bool, Callable[[], None]]] = [
        (main, lambda: _make_anew(aside)),
        (True, lambda: _write_parts(trainer, aside, extra)),
        (main, lambda: _publish(aside, folder)),
    ]
    for takes_part, stage in stages:
        failure = _failure_of(stage) if takes_part else None
        if trainer.agree(failure is not None):  # which is also where the processes wait for each other
            if main:
                shutil.rmtree(aside, ignore_errors=True)
            raise SaveError(f"could not write {folder}: {failure or 'another process failed'}; {last_good(run)}")
    return folder


def _failure_of(action: Callable[[], None]) -> str | None:
    """Why an action could not write; None if it could."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_parts(trainer: Trainer, aside: Path, extra: dict[str, Any]) -> None:
    rank = trainer.accelerator.process_index
    save_file(_on_cpu(own_state(trainer)), aside / f"process-{rank}.safetensors")
    if not trainer.accelerator.is_main_process:
        return
    save_checkpoint(trainer.model, aside / MODEL)
    if trainer.average is not None:
        save_checkpoint(trainer.averaged_model, aside / AVERAGE)
    tensors, rest = _optimizer_parts(trainer)
    save_file(tensors, aside / OPTIMIZER)
    state = {"processes": trainer.accelerator.num_processes, "optimizer": rest, **shared_state(trainer), **extra}
    (aside / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def _publish(aside: Path, folder: Path) -> None:
    """Bring everything to the disk, then give it its name."""
    write_checksums(aside)
    sync_folder(aside)
    replaced = folder.with_name(f"{folder.name}.replaced")
    if folder.exists():  # the same step, written once before
        _discard(replaced)
        folder.rename(replaced)
    aside.rename(folder)
    sync(folder.parent)
    _discard(replaced)


def _discard(folder: Path) -> None:
    """Remove a checkpoint, if it is there, under a name that is none: half of one is never taken for a whole."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _optimizer_parts(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the optimiser as tensors by name, and the rest for JSON."""
    state = trainer.optimizer.state_dict()
    tensors = {f"{number}.{name}": value for number, values in state["state"].items() for name, value in values.items()}
    scaler = trainer.accelerator.scaler
    return _on_cpu(tensors), {
        "groups": state["param_groups"],
        "average_updates": 0 if trainer.average is None else int(trainer.average.n_averaged),
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises ValueError where there is none."""
    try:
        state = read_object(checkpoint / STATE)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a checkpoint, got {str(checkpoint)!r}: {error}") from None
    if not ({"processes", "progress", "best", "text"} <= state.keys() and _has_steps(state["progress"], state["best"])):
        raise ValueError(f"expected a checkpoint, got {str(checkpoint)!r}, whose {STATE} is that of none")
    return state


def _has_steps(progress: Any, best: Any) -> bool:
    """Whether it says how far it is, and which validation was the best, if there was one."""
    if best is not None and not (isinstance(best, dict) and isinstance(best.get("loss"), float)):
        return False
    return all(isinstance(each, dict) and isinstance(each.get("step"), int) for each in (progress, best or progress))


def restore(trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """Let a trainer of the same configuration stand where the checkpoint was written; returns its state.json.

    Raises ValueError for a checkpoint that is damaged, or of another number of processes.
    """
    state, accelerator = read_state(checkpoint), trainer.accelerator
    if state["processes"] != accelerator.num_processes:
        raise ValueError(
            f"expected {state['processes']} processes, as {checkpoint} has, got {accelerator.num_processes}"
        )
    own = f"process-{accelerator.process_index}.safetensors"
    with _naming(checkpoint):
        verify(checkpoint, MODEL, OPTIMIZER, STATE, own, *([] if trainer.average is None else [AVERAGE]))
        load_weights(trainer.model, read_weights(checkpoint / MODEL))
        if trainer.average is not None:
            load_weights(trainer.averaged_model, read_weights(checkpoint / AVERAGE))
            trainer.average.n_averaged.fill_(state["optimizer"]["average_updates"])
        _load_optimizer(trainer, read_weights(checkpoint / OPTIMIZER), state["optimizer"])
        load_shared_state(trainer, state)
        load_own_state(trainer, read_weights(checkpoint / own))
    return state


@contextmanager
def _naming(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"expected a whole checkpoint, got {str(checkpoint)!r}: {error}") from error


def _load_optimizer(trainer: Trainer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, field = name.split(".", 1)
        states.setdefault(int(number), {})[field] = tensor
    trainer.optimizer.load_state_dict({"state": states, "param_groups": rest["groups"]})
    if trainer.accelerator.scaler is not None and rest["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(rest["scaler"])


def keep_only(run: Path, steps: set[int]) -> None:
    """Remove the checkpoints of other steps, and what interrupted writes have left. What cannot be removed stays."""
    for left in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    kept = {path for step, path in checkpoints_of(run).items() if step in steps}
    for path in (run / "checkpoints").glob("step-*"):
        if path not in kept and _NAME.fullmatch(path.name):
            with suppress(OSError):
                _discard(path)
