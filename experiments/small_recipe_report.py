"""Tables and plots from the runs of `small_recipe.py`; runs that are not there are left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memorizing_transformers_pytorch.evaluation.summary import drawn_means, interval

LENGTHS = ("10", "30", "60", "120")
LOCAL_STEPS = {"10": "1,000", "30": "3,000", "60": "6,000", "120": "12,000"}
SEEDS = (0, 1, 2)
TEXTS = ("plays", "coq")
ON = "8192"
COLORS = {"memory": "tab:blue", "same-time": "tab:orange", "same-tokens": "tab:gray", "window1024": "tab:green"}


class Result(NamedTuple):
    """The evaluation of a run, and what its training cost (seconds of its steps; others ran beside it)."""

    evaluation: dict[str, Any]

    def loss(self, mode: str) -> float:
        return float(self.evaluation["modes"][mode]["loss"]["value"])

    def sums(self, mode: str) -> np.ndarray:
        """Nats of each document."""
        return np.array([d["loss"][mode] * d["tokens"] for d in self.evaluation["documents"]])

    @property
    def tokens(self) -> np.ndarray:
        return np.array([document["tokens"] for document in self.evaluation["documents"]])


def result(output: Path, name: str) -> Result | None:
    """What a run gave, if it is there."""
    if not (output / name / "done.json").is_file():
        return None
    return Result(json.loads((output / name / "evaluation" / "evaluation.json").read_text()))


def change(this: Result, mode: str, other: Result, other_mode: str) -> str:
    """How the perplexity of one run differs from that of another on the same documents, with a paired interval."""
    assert np.array_equal(this.tokens, other.tokens)
    value = math.expm1(this.loss(mode) - other.loss(other_mode))
    means = drawn_means(np.stack([this.sums(mode), other.sums(other_mode)]), this.tokens)
    drawn = None if means is None else np.expm1(means[0] - means[1])
    found = interval(drawn)
    return f"{value:+.1%}" + ("" if found is None else f" [{found.low:+.1%}, {found.high:+.1%}]")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown, without columns in which nothing is known."""
    known = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
    header, rows = [header[i] for i in known], [[row[i] for i in known] for row in rows]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def perplexity(found: Result | None, mode: str) -> str:
    return "-" if found is None or mode not in found.evaluation["modes"] else f"{math.exp(found.loss(mode)):.2f}"


def main_table(output: Path) -> str:
    header = ["length", "seed", "same time, no memory", "same tokens, no memory", "same time, window 1,024"]
    header += ["**memory, 8,192**", "against the same time", "same time, memory only at test"]
    rows = []
    for length in LENGTHS:
        for seed in SEEDS:
            run, time, tokens, window = (
                result(output, f"{kind}-{length}-seed{seed}")
                for kind in ("memory", "same-time", "same-tokens", "window1024")
            )
            if run is None or time is None:
                continue
            cells = [perplexity(time, "off"), perplexity(tokens, "off"), perplexity(window, "off")]
            cells += [f"**{perplexity(run, ON)}**", change(run, ON, time, "off"), perplexity(time, ON)]
            rows.append([LOCAL_STEPS[length], str(seed), *cells])
    return table(header, rows)


def size_table(output: Path) -> str:
    """The same weights with memories of several sizes, and with those of no use."""
    names = {"off": "off", "512": "512", "2048": "2,048", "8192": "8,192", "65536": "65,536"}
    names |= {"other": "another document's", "shuffled": "values shuffled", "random keys": "random keys"}
    columns = [(length, found) for length in LENGTHS if (found := result(output, f"memory-{length}-seed0"))]
    rows = [
        [label, *(perplexity(found, mode) for _, found in columns)]
        for mode, label in names.items()
        if any(mode in found.evaluation["modes"] for _, found in columns)
    ]
    return table(["memory", *(f"{LOCAL_STEPS[length]} local steps" for length, _ in columns)], rows)


def text_table(output: Path) -> str:
    """The recipe and its baseline on other corpora."""
    rows = []
    for text in TEXTS:
        found, baseline = (result(output, f"variant-{text}-{kind}") for kind in ("recipe", "memory-never"))
        if found is not None and baseline is not None:
            documents = str(len(found.tokens))
            cells = [perplexity(baseline, "off"), perplexity(found, "off"), f"**{perplexity(found, ON)}**"]
            rows.append([text, documents, *cells, change(found, ON, baseline, "off")])
    header = [
        "text",
        "test documents",
        "same time, no memory",
        "memory off",
        "**memory, 8,192**",
        "against the same time",
    ]
    return table(header, rows)


def variant_table(output: Path) -> str:
    names = sorted(path.name for path in output.glob("variant-*") if (path / "done.json").is_file())
    names = [name for name in names if not any(name.startswith(f"variant-{text}-") for text in TEXTS)]
    baseline = result(output, "variant-memory-never")
    rows = []
    for name in sorted(names, key=lambda name: name != "variant-recipe"):
        found = result(output, name)
        assert found is not None
        bits = [found.evaluation["modes"][mode]["bits_per_byte"] for mode in ("off", ON)]
        same = baseline is not None and np.array_equal(found.tokens, baseline.tokens)
        against = change(found, ON, baseline, "off") if same and baseline is not None else "-"
        cells = [perplexity(found, "off"), perplexity(found, ON), *(f"{b:.3f}" for b in bits), against]
        rows.append([name.removeprefix("variant-"), *cells])
    header = ["variant", "perplexity, off", "on", "bits per byte, off", "on", "on, against memory-never off"]
    return table(header, rows)


def plots(output: Path, to: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    lengths, positions = figure.subplots(1, 2)
    for kind, mode, label in (
        ("same-time", "off", "no memory, same time"),
        ("same-tokens", "off", "no memory, same tokens"),
        ("window1024", "off", "no memory, window 1,024, same time"),
        ("memory", ON, "memory, 8,192 entries"),
    ):
        points = list(_points(output, kind, mode))
        if points:
            steps, values = zip(*points, strict=True)
            lengths.plot(steps, values, "o", color=COLORS[kind], alpha=0.4, markersize=4)
            means = {step: np.mean([v for s, v in points if s == step]) for step in sorted(set(steps))}
            lengths.plot(list(means), list(means.values()), color=COLORS[kind], label=label)
    lengths.set(xlabel="training time (local steps)", ylabel="held-out perplexity", xscale="log")
    lengths.set(title="By training time; a dot is a seed")
    lengths.set_xticks([int(steps.replace(",", "")) for steps in LOCAL_STEPS.values()], LOCAL_STEPS.values())
    lengths.minorticks_off()
    _plot_positions(output, positions)
    for axes in (lengths, positions):
        axes.legend(fontsize=8, frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(to / "small-recipe.png", dpi=110)


def _points(output: Path, kind: str, mode: str) -> Iterator[tuple[int, float]]:
    for length in LENGTHS:
        for seed in SEEDS:
            found = result(output, f"{kind}-{length}-seed{seed}")
            if found is not None:
                yield int(LOCAL_STEPS[length].replace(",", "")), math.exp(found.loss(mode))


def _plot_positions(output: Path, axes: Any) -> None:
    """Loss by position of the longest run, and of its baseline."""
    there = [length for length in LENGTHS if result(output, f"memory-{length}-seed0")]
    if not there:
        return
    memory, time = (result(output, f"{kind}-{there[-1]}-seed0") for kind in ("memory", "same-time"))
    assert memory is not None
    curves = [(memory, "off", "the same weights, off", ":", "tab:blue")]
    blues = {"512": "tab:cyan", ON: "tab:blue", "65536": "tab:purple"}
    curves += [(memory, mode, f"memory, {int(mode):,}", "-", color) for mode, color in blues.items()]
    if time is not None:
        curves.append((time, "off", "no memory, same time", "-", "tab:orange"))
    for found, mode, label, style, color in curves:
        known = found.evaluation["positions"]
        if mode in known["losses"]:
            middles = [math.sqrt(a * b) for a, b in zip(known["edges"], known["edges"][1:], strict=False) if a > 0]
            axes.plot(middles, known["losses"][mode][-len(middles) :], style, color=color, label=label)
    axes.set(xlabel="position in the document (tokens)", ylabel="nats per token", xscale="log", xlim=(64, None))
    axes.set(title=f"By position, after {LOCAL_STEPS[there[-1]]} local steps")


def write(output: Path, to: Path) -> None:
    """Print the tables, and draw small-recipe.png in the folder `to`."""
    to.mkdir(parents=True, exist_ok=True)
    cost = json.loads((output / "calibration.json").read_text())["cost"]
    evaluations = list(output.glob("*/evaluation/evaluation.json"))
    commits = sorted({str(json.loads(path.read_text())["commit"])[:8] for path in evaluations})
    costs = ", ".join(f"{name} {value:.2f}" for name, value in cost.items())
    text = f"Commit {', '.join(commits)}. Cost of a step, in local steps: {costs}.\n\n"
    text += "\n".join(part(output) for part in (main_table, size_table, text_table, variant_table))
    plots(output, to)
    print(text)
