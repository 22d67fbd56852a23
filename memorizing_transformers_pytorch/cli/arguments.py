"""Arguments to dataclasses, with tyro, whose errors become one line."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Sequence
from typing import TypeVar

import tyro

Options = TypeVar("Options")

_BOX = "╭╮╰╯│─ "


def parse_arguments(
    kind: type[Options], arguments: Sequence[str], program: str, default: Options | None = None
) -> Options:
    """The arguments as this dataclass. Raises ValueError for unknown arguments and bad values."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, args=list(arguments), prog=program)
            return tyro.cli(kind, args=list(arguments), prog=program, default=default)
    except SystemExit as stopped:
        if stopped.code != 2:
            raise
    # The box that tyro draws: a title, the message, an empty line, then hints.
    lines = [line.strip(_BOX) for line in said.getvalue().splitlines()[1:]]
    raise ValueError(" ".join(itertools.takewhile(bool, lines)).removeprefix("Error parsing "))
