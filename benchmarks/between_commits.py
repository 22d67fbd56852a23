"""How fast one checkout of this repository is beside another, in one run, in turn.

    python -m benchmarks.between_commits BEFORE/.venv/bin/python BEFORE AFTER/.venv/bin/python AFTER --vectors FILE

Each folder is a checkout (`git worktree add`), each Python has that checkout installed. vectors: of a trained model, as
`python -m benchmarks` keeps them. Printed are seconds of the second over seconds of the first, by medians: below 1 is
faster.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.race import Contestant, Record, race
from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance

TRIALS: dict[str, tuple[str, Record]] = {
    "step, no memory": ("step", {"rows": 2, "entries": 0}),
    "step, 8,192 entries, exact": ("step", {"rows": 2, "entries": 8_192}),
    "step, 65,536 entries, exact": ("step", {"rows": 2, "entries": 65_536}),
    "step, 65,536 entries, auto": ("step", {"rows": 2, "entries": 65_536, "index": "auto"}),
    "look-up, 8,192 entries, exact": ("look_up", {"entries": 8_192}),
    "look-up, 65,536 entries, exact": ("look_up", {"entries": 65_536}),
    "look-up, 65,536 entries, auto": ("look_up", {"entries": 65_536, "index": "auto"}),
    "writing, no memory": ("write", {"entries": 0, "batch": 1}),
    "writing, 65,536 entries, auto": ("write", {"entries": 65_536, "batch": 1, "index": "auto"}),
}


@dataclass(frozen=True)
class Options:
    python_before: tyro.conf.Positional[Path]
    before: tyro.conf.Positional[Path]
    python_after: tyro.conf.Positional[Path]
    after: tyro.conf.Positional[Path]
    vectors: Path
    rounds: int = 7


def main(options: Options) -> None:
    checkouts = {
        "before": (options.python_before, options.before),
        "after": (options.python_after, options.after),
    }
    lines = ["| | before (range) | after (range) | after / before |", "|---|---|---|---|"]
    for name, (action, given) in TRIALS.items():
        settings = given | {"vectors": str(options.vectors.absolute())}
        racers = {
            which: Contestant(str(folder.absolute() / "benchmarks/ours.py"), action, settings, str(python.absolute()))
            for which, (python, folder) in checkouts.items()
        }
        before, after = (_seconds(records) for records in race(racers, options.rounds).values())
        ratio = after[1] / before[1]
        lines.append(f"| {name} | {_shown(before)} | {_shown(after)} | {ratio:.2f} |")
    print("\n".join(lines))
    print(f"({options.rounds} rounds in turn; {origin(provenance(torch.device('cpu')))})")


def _seconds(records: list[Any]) -> tuple[float, float, float]:
    """Least, median and most."""
    seconds = sorted(each["seconds"] if "seconds" in each else 1 / each["tokens_per_second"] for each in records)
    return seconds[0], seconds[len(seconds) // 2], seconds[-1]


def _shown(seconds: tuple[float, float, float]) -> str:
    return f"{seconds[1]:.4f} s ({seconds[0]:.4f}-{seconds[2]:.4f})"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
