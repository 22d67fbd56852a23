"""Read mutated files: `python -m tests.fuzz --inputs 100000 --seed 0`.

Ends with status 1 at the first input of which came an error that is not documented, or that ended the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .campaign import ACCEPTED, Finding, judge_all, targets_of

SHARED = Path("/dev/shm")  # in memory, where there is such a thing


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many in all, the same for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only this one; may be given several times")
    parser.add_argument("--input", type=int, help="only the input of this number, to repeat it")
    parser.add_argument("--seconds", type=float, default=20, help="for one input, which takes milliseconds")
    parser.add_argument("--keep-going", action="store_true", help="tell of all that is found, not only of the first")
    parser.add_argument("--targets", default="tests.fuzz.targets", help="the module whose TARGETS are read")
    parser.add_argument("--status", type=Path, help=argparse.SUPPRESS)  # given to the process that reads
    return parser.parse_args(arguments)


def table(counts: dict[str, Counter[str]]) -> str:
    """A line for each target: how many inputs came to what."""
    kinds = [ACCEPTED, *sorted({kind for seen in counts.values() for kind in seen} - {ACCEPTED})]
    rows = [["target", "inputs", *kinds]]
    for name, seen in (*counts.items(), ("all", sum(counts.values(), Counter()))):
        rows.append([name, f"{seen.total():,}", *(f"{seen[kind]:,}" for kind in kinds)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(cells) for cells in aligned)


def again(seed: int, target: str, number: int) -> str:
    return f"python -m tests.fuzz --seed {seed} --target {shlex.quote(target)} --input {number}"


def show(findings: list[Finding], seed: int) -> None:
    for target, number, what in findings:
        print(f"\n{target}, input {number} of seed {seed}: not documented\n{what}again: {again(seed, target, number)}")


def read(options: argparse.Namespace) -> int:
    """In the process that reads."""
    known = targets_of(options.targets)
    chosen = [known[name] for name in options.target or known]
    each = -(-options.inputs // len(chosen))
    numbers = range(each) if options.input is None else [options.input]
    began = time.perf_counter()
    counts, findings = judge_all(chosen, numbers, options.seed, options.status, options.seconds, options.keep_going)
    print(table(counts))
    print(f"{time.perf_counter() - began:.0f} seconds, seed {options.seed}")
    show(findings, options.seed)
    return bool(findings)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    if options.status is not None:
        return read(options)
    given = list(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=SHARED if os.access(SHARED, os.W_OK) else None) as folder:
        status = Path(folder) / "reading"
        status.touch()
        command = [sys.executable, "-m", "tests.fuzz", *given, "--status", str(status)]
        code = subprocess.call(command, env=os.environ | {"OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"})
        reading = status.read_text(encoding="utf-8").strip()
    if reading:
        target, number = json.loads(reading)
        print(f"\n{target}, input {number} of seed {options.seed}: it has ended the process, by {code}")
        print(f"again: {again(options.seed, target, number)}")
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
