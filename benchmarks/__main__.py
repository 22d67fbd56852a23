"""python -m benchmarks [--quick] [--only step look_up ...] [--results FILE]: measure, keep the results, write the page.

What is measured anew replaces what the file of results holds of it; the rest stays, each with where it comes from.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.measurements import MEASUREMENTS, Setting
from benchmarks.page import write_page
from benchmarks.vectors import trained_vectors
from memorizing_transformers_pytorch.evaluation.provenance import provenance

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure what a memory costs, side by side with its rivals."""

    quick: bool = False
    """Fewer rounds and smaller memories: some minutes."""
    only: tuple[str, ...] = ()
    """Measure only these: step, parts, look_up, sweep, writing, growth, scale."""
    results: Path = ROOT / "docs" / "performance.json"
    """Where the results are kept."""
    page: Path | None = ROOT / "docs" / "performance.md"
    """Where they are shown; plots go beside it."""
    folder: Path = ROOT / ".bench"
    """For the environment of the original, a trained model and files of memories."""


def main(options: Options) -> None:
    unknown = set(options.only) - set(MEASUREMENTS)
    if unknown:
        raise SystemExit(f"expected measurements among {', '.join(MEASUREMENTS)}, got {', '.join(sorted(unknown))}")
    original = options.folder / "original"
    subprocess.run([ROOT / "scripts" / "original_environment.sh", original], check=True)
    steps, count = (200, 80_000) if options.quick else (500, 1_100_000)
    vectors = trained_vectors(options.folder, count, steps)
    setting = Setting(options.quick, str(original / "bin" / "python"), str(vectors), options.folder)
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    for name in options.only or MEASUREMENTS:
        print(name, flush=True)
        found = MEASUREMENTS[name](setting)
        results[name] = {"found": found, "quick": options.quick, **provenance(torch.device("cpu"))}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if options.page is not None:
        write_page(results, options.page)


if __name__ == "__main__":
    main(tyro.cli(Options))
