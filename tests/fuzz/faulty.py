"""Targets with faults, by which it is tested that faults are found."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .target import Read, Target

VALID = json.dumps({"size": 1, "more": list(range(9))})


def faulty(fault: Callable[[], object], folder: Path) -> Read:
    """Reads well what is valid."""
    path = folder / "some.json"
    path.write_text(VALID, encoding="utf-8")

    def read() -> None:
        if path.read_text(encoding="utf-8", errors="replace") != VALID:
            fault()

    return read


def undocumented() -> None:
    raise KeyError("expected a size, got none")


def silent() -> None:
    raise ValueError("invalid")


TARGETS = (
    Target("undocumented", partial(faulty, undocumented)),
    Target("says nothing", partial(faulty, silent)),
    Target("documented", partial(faulty, undocumented), errors=(KeyError,)),
    Target("large", partial(faulty, lambda: bytes(1 << 40))),
    Target("slow", partial(faulty, lambda: time.sleep(3600))),
    Target("crash", partial(faulty, lambda: ctypes.string_at(0))),
)
