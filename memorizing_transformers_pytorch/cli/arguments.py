"""Arguments to dataclasses, by tyro; what it refuses becomes one line. And what several commands make of theirs."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import tyro

from memorizing_transformers_pytorch.memory.checks import check_device
from memorizing_transformers_pytorch.training.run import RUNS, SHIPPED, newest_run

Options = TypeVar("Options")

MORE_ROOM = " (--max-memories, for a new memory)"  # what to do if documents were evicted
_BOX = "╭╮╰╯│─ "


def parse_arguments(kind: type[Options], arguments: Sequence[str], program: str, **tyro_options: Any) -> Options:
    """The arguments as this dataclass. Raises ValueError for unknown ones and for values that make no sense."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Options = tyro.cli(kind, args=list(arguments), prog=program, **tyro_options)
            return parsed
    except SystemExit as stopped:
        if stopped.code != 2:
            raise
    raise ValueError(_first_paragraph(said.getvalue()))


def chosen_device(name: str | None) -> str:
    """The device of this name; unless given, CUDA where there is one. Raises ValueError for one that is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def default_model() -> str:
    """The newest run below ./runs, or else the model that comes with the package, which is then said."""
    run = newest_run(RUNS)
    if run is not None:
        return str(run)
    said = "the model that comes with the package is used; memorizing-transformers train makes one of your own"
    print(f"no run below {str(RUNS)!r}: {said}", file=sys.stderr)
    return SHIPPED.name


def name_of(model: str) -> str:
    """What to call a model on a page."""
    return "the shipped model" if model == SHIPPED.name else model


def _first_paragraph(box: str) -> str:
    """What stands in the box that tyro draws, between its title and the first rule."""
    found: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip(_BOX)
        if not text:
            break
        found.append(text)
    return " ".join(found).removeprefix("Error parsing ")
