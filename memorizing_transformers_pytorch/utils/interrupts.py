"""Ctrl-C and SIGTERM as a request to stop soon, instead of an end in the middle of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal asked the program to stop, and the program has saved its state. signal: the number of the signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class StopRequest:
    """signal: the first signal that asked the program to stop; None if there was none."""

    signal: int | None = None


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Inside, the first SIGINT and the first SIGTERM only set the stop request (launchers send one after the other). A
    second signal of the same kind acts as it did before."""
    request, before = StopRequest(), dict[int, Any]()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = request.signal or number
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():  # Python handles signals only there
        for handled in (signal.SIGINT, signal.SIGTERM):
            before[handled] = signal.signal(handled, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
