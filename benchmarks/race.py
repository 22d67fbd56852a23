"""Contestants side by side: each in a process of its own, all built first, then asked in turn, round after round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # bytes, of glibc
Record = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """What a process shall do: an action of a script with options.

    python: of which environment. returns_memory: memory that is let go of goes back to the system at once, so that the
    peak is that of what is used; this takes time.
    """

    script: str
    action: str
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    returns_memory: bool = False


class Running:
    """A contestant that has been started."""

    def __init__(self, contestant: Contestant) -> None:
        command = [contestant.python, str(HERE / contestant.script), contestant.action, json.dumps(contestant.options)]
        pipe, variables = subprocess.PIPE, os.environ | (RETURNED if contestant.returns_memory else {})
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables)

    def wait(self) -> None:
        """Until it is built."""
        self._answer()

    def go(self) -> Record:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Record:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.stop()
            raise RuntimeError(f"{self._process.args} ended with {self._process.returncode}")
        answer: Record = json.loads(line)
        return answer

    def stop(self) -> None:
        self._process.communicate()


def race(
    contestants: Mapping[str, Contestant], rounds: int, warm_up: int = 1, together: bool = False
) -> dict[str, list[Record]]:
    """What each answered in each round. The order turns, so that nobody always follows the same one.

    together: build all at the same time, where how long that takes is not measured and there are cores enough.
    """
    running: dict[str, Running] = {}
    try:
        for name, contestant in contestants.items():
            print(f"  building {name}", flush=True)
            running[name] = Running(contestant)
            if not together:
                running[name].wait()
        if together:
            for each in running.values():
                each.wait()
        found: dict[str, list[Record]] = {name: [] for name in contestants}
        for number in range(-warm_up, rounds):
            names = list(contestants)
            first = number % len(names)
            for name in names[first:] + names[:first]:
                answer = running[name].go()
                if number >= 0:
                    found[name].append(answer)
                    print(f"  round {number + 1}: {name} {answer['seconds']:.3f} s", flush=True)
    finally:
        for each in running.values():
            each.stop()
    return found


def median(records: Sequence[Record], name: str = "seconds") -> float:
    values = sorted(record[name] for record in records)
    return float(values[len(values) // 2])


def summary(records: Sequence[Record], name: str = "seconds") -> Record:
    """Median and range."""
    values = [record[name] for record in records]
    return {"median": median(records, name), "least": min(values), "most": max(values), "rounds": len(values)}
