"""The model and the device that a command takes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from memorizing_transformers_pytorch.memory.checks import check_device
from memorizing_transformers_pytorch.training.run import CONFIG, RUNS, SHIPPED, newest_run


def chosen_device(name: str | None) -> str:
    """The device of this name; by default CUDA where there is one. Raises ValueError if this machine lacks it."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def default_model() -> str:
    """The newest run below ./runs, or else (with a message) the model that comes with the package."""
    run = newest_run(RUNS)
    if run is not None:
        return str(run)
    said = "the model that comes with the package is used; memorizing-transformers train makes one of your own"
    print(f"no run below {str(RUNS)!r}: {said}", file=sys.stderr)
    return SHIPPED.name


def is_of_transformers(model: Path) -> bool:
    """Whether this is the folder of a model of transformers, or its name on the hub (owner/name), and no run."""
    if model.is_dir():
        is_model = (model / "config.json").is_file() or any(model.glob("*.gguf"))
        return is_model and not (model / CONFIG).is_file()
    return not model.exists() and len(model.parts) == 2 and not model.parent.exists()


def name_of(model: str) -> str:
    """What to call a model on a page."""
    return "the shipped model" if model == SHIPPED.name else model
