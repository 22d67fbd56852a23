"""Checkpoints of a training run, which resume exactly: weights, optimiser, place in the data, memories.

A checkpoint is a folder `checkpoints/step-N` of safetensors files and one JSON file; nothing is pickled. It is written
under another name, synced to the disk and then renamed; before it is removed, it is renamed again. So a folder of that
name is always complete. (So is `step-N.replaced`, which exists for a moment when step N is written again.)

    model.safetensors       weights, with the configuration of the model
    average.safetensors     their moving average, if one is kept
    optimizer.safetensors   the tensors of the optimiser
    process-R.safetensors   what only process R has: memories, state of its rows, random numbers
    state.json              everything else, such as the number of processes
    checksums.json          of all these files; they are checked when they are read
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import dacite
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from memorizing_transformers_pytorch.model.checkpoint import load_weights, read_weights, save_checkpoint
from memorizing_transformers_pytorch.model.state import XLMemories
from memorizing_transformers_pytorch.training.trainer import Progress, Trainer
from memorizing_transformers_pytorch.utils.durable import SaveError, sync, sync_folder, verify, write_checksums
from memorizing_transformers_pytorch.utils.plain_json import read_object

MODEL, AVERAGE, OPTIMIZER, STATE = "model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"
_DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
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

    def start() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    stages: list[tuple[bool, Callable[[], None]]] = [
        (main, start),
        (True, lambda: _write_parts(trainer, aside, extra)),
        (main, lambda: _publish(aside, folder)),
    ]
    for takes_part, stage in stages:
        failure = None
        try:
            if takes_part:
                stage()
        except (OSError, SafetensorError) as error:
            failure = str(error)
        if trainer.agree(failure is not None):  # which is also where the processes wait for each other
            if main:
                shutil.rmtree(aside, ignore_errors=True)
            raise SaveError(f"could not write {folder}: {failure or 'another process failed'}; {last_good(run)}")
    return folder


def _write_parts(trainer: Trainer, aside: Path, extra: dict[str, Any]) -> None:
    rank, scaler = trainer.accelerator.process_index, trainer.accelerator.scaler
    save_file(own_state(trainer), aside / f"process-{rank}.safetensors")
    if not trainer.accelerator.is_main_process:
        return
    save_checkpoint(trainer.model, aside / MODEL)
    if trainer.average is not None:
        save_checkpoint(trainer.averaged_model, aside / AVERAGE)
    optimizer = trainer.optimizer.state_dict()
    save_file(_flat({str(number): values for number, values in optimizer["state"].items()}), aside / OPTIMIZER)
    state = {
        "processes": trainer.accelerator.num_processes,
        "optimizer": {
            "groups": optimizer["param_groups"],
            "average_updates": 0 if trainer.average is None else int(trainer.average.n_averaged),
            "scaler": None if scaler is None else scaler.state_dict(),
        },
        "progress": dataclasses.asdict(trainer.progress),
        "stream": trainer.stream.state_dict(),
        **extra,
    }
    (aside / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def own_state(trainer: Trainer) -> dict[str, Tensor]:
    """What each process has alone: memories, state of its rows, random numbers."""
    parts = {"memories": trainer.memories.state_dict(), "random": {"cpu": torch.get_rng_state()}}
    parts |= {f"states.{group}": state.state_dict() for group, state in enumerate(trainer.states)}
    if trainer.accelerator.device.type == "cuda":
        parts["random"]["cuda"] = torch.cuda.get_rng_state()
    return _flat(parts)


def _load_own_state(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    device = trainer.accelerator.device
    if trainer.memories:
        capacity, most = int(tensors["memories.0.capacity"]), trainer.config.model.max_knn_memories
        if not 1 <= capacity <= most:
            raise ValueError(f"expected memories of 1 to {most} entries, got {capacity}")
        trainer.memories.resize(capacity)
    trainer.memories.load_state_dict(_part("memories", tensors))
    groups = range(len(trainer.groups))
    trainer.states = [XLMemories.from_state_dict(_part(f"states.{group}", tensors), device) for group in groups]
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _flat(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One dict of tensors on the CPU, each named PART.NAME."""
    return {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _part(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, for one part."""
    return {name[len(part) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _publish(aside: Path, folder: Path) -> None:
    """Sync everything to the disk, then rename it."""
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
    """Rename a checkpoint, if it exists, before removing it: a half-removed one is never taken for a whole one."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises ValueError for a folder that is no checkpoint."""
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
    """Load a checkpoint into a trainer with the same configuration; returns its state.json.

    Raises ValueError for a checkpoint that is damaged, or of another number of processes.
    """
    state, accelerator = read_state(checkpoint), trainer.accelerator
    if state["processes"] != accelerator.num_processes:
        raise ValueError(
            f"expected {state['processes']} processes, as {checkpoint} has, got {accelerator.num_processes}"
        )
    own, average = f"process-{accelerator.process_index}.safetensors", trainer.average
    try:
        verify(checkpoint, MODEL, OPTIMIZER, STATE, own, *([] if average is None else [AVERAGE]))
        load_weights(trainer.model, read_weights(checkpoint / MODEL))
        if average is not None:
            load_weights(trainer.averaged_model, read_weights(checkpoint / AVERAGE))
            average.n_averaged.fill_(state["optimizer"]["average_updates"])
        _load_optimizer(trainer, read_weights(checkpoint / OPTIMIZER), state["optimizer"])
        trainer.stream.load_state_dict(state["stream"])
        trainer.progress = dacite.from_dict(Progress, state["progress"], dacite.Config(strict=True))
        _load_own_state(trainer, read_weights(checkpoint / own))
    except (*_DAMAGE, dacite.DaciteError) as error:
        raise ValueError(f"expected a whole checkpoint, got {str(checkpoint)!r}: {error}") from error
    return state


def _load_optimizer(trainer: Trainer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    states = {int(number): _part(number, tensors) for number in {name.split(".")[0] for name in tensors}}
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
