"""python -m benchmarks [--quick] [--device cuda] [--only step look_up ...]: measure, keep the results, write the page.

What is measured anew replaces what the file of results holds of it; the rest stays, each with where it comes from.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.measurements import MEASUREMENTS, ON_GPU, Setting
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
    """Measure only these: step, space, parts, look_up, sweep, writing, growth, scale."""
    measure: bool = True
    """With --no-measure the page is written anew from the results that there are."""
    largest: int = 1_000_000
    """Entries of the largest memory that is looked up in and written with."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model and its memory lie. On a GPU: step, space, look_up, writing."""
    results: Path = ROOT / "docs"
    """A folder: for performance.json (or performance-gpu.json), performance.md and its plots."""
    folder: Path = ROOT / ".bench"
    """For the environment of the original, a trained model and files of memories."""


def main(options: Options) -> None:
    measurements = MEASUREMENTS if options.device == "cpu" else {name: MEASUREMENTS[name] for name in ON_GPU}
    unknown = set(options.only) - set(measurements)
    if unknown:
        raise SystemExit(f"expected measurements among {', '.join(measurements)}, got {', '.join(sorted(unknown))}")
    here, there = options.results / "performance.json", options.results / "performance-gpu.json"
    if options.measure:
        measure(options, options.only or tuple(measurements), here if options.device == "cpu" else there)
    notes = (Path(__file__).parent / "notes.md").read_text(encoding="utf-8")
    write_page(read(here), options.results / "performance.md", read(there), notes)


def measure(options: Options, names: tuple[str, ...], file: Path) -> None:
    """Measure what has these names, and keep each result in the file as soon as it is there."""
    original = options.folder / "original"
    subprocess.run([ROOT / "scripts" / "original_environment.sh", original], check=True)
    steps, count = (200, 80_000) if options.quick else (500, 1_100_000)
    vectors = trained_vectors(options.folder, count, steps, options.device)
    python = str(original / "bin" / "python")
    setting = Setting(options.quick, python, str(vectors), options.folder, options.device, options.largest)
    options.results.mkdir(parents=True, exist_ok=True)
    results = read(file)
    for name in names:
        print(name, flush=True)
        found = MEASUREMENTS[name](setting)
        results[name] = {"found": found, "quick": options.quick, **provenance(torch.device(options.device))}
        file.write_text(json.dumps(results, indent=1), encoding="utf-8")


def read(file: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return results


if __name__ == "__main__":
    main(tyro.cli(Options))
