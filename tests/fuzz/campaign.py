"""Mutated inputs, one after the other: how each is judged, and how a process that they end is told of.

Input number N of a target depends on the seed, the name of the target and N alone, so that each can be repeated. They
are read in a process of its own, with a limit on memory and on the time of each, which notes what it is reading.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import resource
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from .mutations import mutated
from .target import Target

MEMORY_BYTES = 1 << 30  # beyond what the process has when it begins; the inputs have some kilobytes
ACCEPTED = "accepted"


class Finding(NamedTuple):
    """An input of which came what should not."""

    target: str
    number: int
    what: str


def targets_of(module: str) -> dict[str, Target]:
    found: Sequence[Target] = importlib.import_module(module).TARGETS
    return {target.name: target for target in found}


def limit_memory() -> None:
    """No input may make this process take much more than it has."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Bench:
    """A target in a folder, ready to be read again and again."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder = target, folder
        folder.mkdir()
        self._read = target.make(folder)
        target.seal(folder)
        self._whole = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        self._names = [path for path in sorted(folder.glob(target.files)) if path.is_file()]
        self._read()
        self._put_back()

    def _put_back(self) -> None:
        """What was mutated or sealed, or is written by reading."""
        for path, content in self._whole.items():
            if path.read_bytes() != content:
                path.write_bytes(content)

    def mutate(self, seed: int, number: int) -> None:
        """Input of this number, put into the folder."""
        random = Random(f"{seed} {self.target.name} {number}")
        path = random.choice(self._names)
        among = {each.name: self._whole[each] for each in self._names}
        path.write_bytes(mutated(path.name, among, random))
        self.target.seal(self.folder)

    def judge(self, seed: int, number: int) -> tuple[str, str | None]:
        """What came of this input, and if that is not documented, the whole of it."""
        self.mutate(seed, number)
        try:
            self._read()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the libraries below raise even what is no Exception
            kind = type(error).__name__
            documented = isinstance(error, self.target.errors) and "expected " in str(error)
            return kind, None if documented else traceback.format_exc(limit=-12)
        finally:
            self._put_back()
        return ACCEPTED, None


def judge_all(
    targets: Iterable[Target], numbers: Sequence[int], seed: int, status: Path, seconds: float, keep_going: bool
) -> tuple[dict[str, Counter[str]], list[Finding]]:
    """Judge inputs of these numbers of every target, until one is not as it should be. status: a file that says what is
    being read; inputs are made beside it."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    counts: dict[str, Counter[str]] = {}
    findings: list[Finding] = []
    benches = [Bench(target, status.with_name(str(i))) for i, target in enumerate(targets)]
    gc.freeze()  # what stays is not searched after every target
    limit_memory()
    with status.open("wb", buffering=0) as note:
        for bench in benches:
            name, seen = bench.target.name, counts.setdefault(bench.target.name, Counter())
            for number in numbers:
                note.seek(0)
                note.write(json.dumps([name, number]).ljust(99).encode())
                faulthandler.dump_traceback_later(seconds, exit=True)
                kind, wrong = bench.judge(seed, number)
                seen[kind] += 1
                if wrong is not None:
                    findings.append(Finding(name, number, wrong))
                    if not keep_going:
                        note.truncate(0)
                        return counts, findings
            gc.collect()
        note.truncate(0)
    faulthandler.cancel_dump_traceback_later()
    return counts, findings
