"""Progress bars on stderr. If that is a log file instead of a terminal, they are written seldom."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    desc: str | None = None,
    unit: str = "it",
    unit_scale: bool = False,
    disable: bool = False,
) -> tqdm[Any]:
    """A bar of tqdm, as wide as the terminal."""
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        unit_scale=unit_scale,
        disable=disable,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
