"""What a target is. It knows nothing of the package, so that the harness begins at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Read = Callable[[], object]


def _nothing(_: Path) -> None: ...


@dataclass(frozen=True)
class Target:
    """Something that is read.

    make: writes valid files into an empty folder, and returns how they are read. files: which are mutated, as a glob.
    seal: done to the folder after a mutation, such as making checksums anew, so that what lies behind them is read too.
    errors: those that are documented.
    """

    name: str
    make: Callable[[Path], Read]
    files: str = "**/*"
    seal: Callable[[Path], None] = _nothing
    errors: tuple[type[BaseException], ...] = (ValueError,)
