"""Ctrl-C and SIGTERM as a wish to stop soon, not an end in the middle of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run was asked to stop, and has saved where it stands. signal: the number of the signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class Wish:
    """The signal that has asked to stop, if one has."""

    def __init__(self) -> None:
        self.signal: int | None = None


@contextmanager
def stopping_on_signals() -> Iterator[Wish]:
    """Inside, the first SIGINT and the first SIGTERM are noted (launchers send one after the other); a second one of
    the same kind acts as it did before."""
    wish = Wish()
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        wish.signal = wish.signal or number
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield wish
        return
    for handled in (signal.SIGINT, signal.SIGTERM):
        before[handled] = signal.signal(handled, note)
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
