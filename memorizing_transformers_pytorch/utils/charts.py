"""Charts as data, for PNG files here and for pages elsewhere."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Curve(NamedTuple):
    """points: (x, y), in the order of x. band: the interval of each y, if it is known."""

    label: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()


class Chart(NamedTuple):
    """x, y: labels of the axes. log: draw x by powers of two. mark: an x with a name, drawn as a vertical line."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: bool = False
    mark: tuple[float, str] | None = None


def plots_are_possible() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_plots_are_possible() -> None:
    """Raises ValueError, with the remedy, if matplotlib is not installed: better before long work than after it."""
    if not plots_are_possible():
        raise ValueError("plots need matplotlib: pip install 'memorizing_transformers_pytorch[plot]'")


def save_png(charts: Sequence[Chart], path: Path) -> None:
    """Draw the charts that have any points, two in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = [chart for chart in charts if any(curve.points for curve in chart.curves)]
    rows = max(math.ceil(len(charts) / 2), 1)
    figure = Figure(figsize=(12, 4.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, chart in zip(figure.subplots(rows, 2, squeeze=False).flat, charts, strict=False):
        for curve in chart.curves:
            xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
            [line] = axes.plot(xs, ys, marker="." if len(xs) < 50 else "", label=curve.label)
            low, high = [low for low, _ in curve.band], [high for _, high in curve.band]
            if len(curve.band) == 1:
                axes.vlines(xs, low, high, color=line.get_color())
            elif curve.band:
                axes.fill_between(xs, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        if chart.mark is not None:
            axes.axvline(chart.mark[0], color="black", linewidth=0.8, linestyle=":", label=chart.mark[1])
        if chart.log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
