"""What a training run draws for people."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memorizing_transformers_pytorch.training.metrics import Record


def plots_are_possible() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_plots_are_possible() -> None:
    """Raises ValueError, with the remedy, if matplotlib is not installed: better before a training than after it."""
    if not plots_are_possible():
        raise ValueError("expected matplotlib for the plots: pip install 'memorizing_transformers_pytorch[plot]'")


def plot_training(records: Sequence[Record], memory_since: int | None, path: Path) -> None:
    """The metrics of a run as a PNG: loss, speed, attention on the memory, and the age of what is retrieved.

    memory_since: the step from which memories were used, if they were.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, speed), (mass, age) = figure.subplots(2, 2)
    _plot_losses(loss, records)
    _plot_speed(speed, [record for record in records if "tokens_per_second" in record])
    logged = [record for record in records if "memory" in record]
    _plot_mass(mass, logged)
    _plot_age(age, logged)
    for axes in (loss, speed, mass, age):
        if memory_since:
            axes.axvline(memory_since, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _plot_losses(axes: Any, records: Sequence[Record]) -> None:
    steps = [record for record in records if record.get("loss") is not None]
    if steps:
        numbers, losses = [r["step"] for r in steps], np.array([r["loss"] for r in steps])
        axes.plot(numbers, losses, color="tab:gray", alpha=0.3, linewidth=0.5)
        axes.plot(numbers, _smoothed(losses), color="tab:gray", label="training, smoothed")
    validations = [record for record in records if "validation" in record]
    for name in sorted({name for record in validations for name in record["validation"]}, reverse=True):
        points = [(r["step"], r["validation"][name]) for r in validations if name in r["validation"]]
        label = "validation, memory off" if name == "off" else f"validation, {int(name):,} entries"
        color = "tab:orange" if name == "off" else None
        axes.plot(*zip(*points, strict=True), marker=".", color=color, label=label)
    if steps:
        axes.set_ylim(None, min(float(losses.max()), 1.3 * float(np.median(losses))))
    axes.set(title="Loss (dotted: the memory is read from here on)", ylabel="nats per token")


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a window of a fiftieth of all steps."""
    width = max(len(values) // 50, 1)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def _plot_speed(axes: Any, steps: Sequence[Record]) -> None:
    numbers = [r["step"] for r in steps]
    if steps:
        axes.plot(numbers, _smoothed(np.array([r["tokens_per_second"] for r in steps])), label="tokens per second")
        axes.set_ylim(0)
        share = axes.twinx()
        share.plot(numbers, _smoothed(np.array([r["searching"] for r in steps])), color="tab:red")
        share.set_ylim(0, 1)
        share.set_ylabel("share of time in search", color="tab:red")
    axes.set(title="Speed", ylabel="tokens per second")


def _plot_mass(axes: Any, logged: Sequence[Record]) -> None:
    for layer in sorted({layer for record in logged for layer in record["memory"]}):
        points = [(r["step"], r["memory"][layer]["mass"]) for r in logged if "mass" in r["memory"].get(layer, {})]
        for head, masses in enumerate(zip(*(mass for _, mass in points), strict=True)):
            axes.plot([step for step, _ in points], masses, linewidth=1, label=f"{layer}, head {head}")
    axes.set(title="Attention mass on the memory", ylabel="share", ylim=(0, 1))


def _plot_age(axes: Any, logged: Sequence[Record]) -> None:
    for layer in sorted({layer for record in logged for layer in record["memory"]}):
        points = [(r["step"], r["memory"][layer]["age"]) for r in logged if "age" in r["memory"].get(layer, {})]
        if points:
            steps, ages = [step for step, _ in points], np.array([age for _, age in points])
            axes.plot(steps, ages[:, 1], label=f"{layer}: median")
            axes.fill_between(steps, ages[:, 0], ages[:, 2], alpha=0.2, label="10% to 90%")
    axes.set(title="Age of retrieved entries", ylabel="tokens")
