"""What the template of a chart draws, in units of the picture: 480 wide, 300 high."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from memorizing_transformers_pytorch.utils.charts import Chart

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 470, 12, 252
_DASHES = ("none", "7 4", "2 4", "10 3 2 3", "14 5", "4 2 1 2")  # colour alone would not tell curves apart
_COLORS, _MOST_ROWS = 6, 24
_Place = Callable[[float], float]


def drawn(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """The charts that have any points."""
    return [_drawn(chart) for chart in charts if any(curve.points for curve in chart.curves)]


def _drawn(chart: Chart) -> dict[str, Any]:
    curves = [curve for curve in chart.curves if curve.points]
    xs, ys = [x for curve in curves for x, _ in curve.points], [y for curve in curves for _, y in curve.points]
    across, x_ticks = _logarithmic(xs) if chart.log else _linear(xs, _LEFT, _RIGHT)
    upward, y_ticks = _linear(ys, _BOTTOM, _TOP)
    lines = []
    for i, curve in enumerate(curves):
        path = "L".join(f"{across(x):.1f} {upward(y):.1f}" for x, y in curve.points)
        single = len(curve.points) == 1
        # From the seventh curve on, the same colours come with other dashes.
        color, dashes = (i + i // len(_DASHES)) % _COLORS, _DASHES[i % len(_DASHES)]
        lines.append(
            {"label": curve.label, "path": path + "h.1" * single, "single": single, "color": color, "dashes": dashes}
        )
    ends = (f"{c.label} from {_brief(c.points[0][1])} to {_brief(c.points[-1][1])}" for c in curves)
    known = [dict(curve.points) for curve in curves]
    places = sorted({place for curve in known for place in curve})
    if len(places) > _MOST_ROWS:
        places = [places[round(i * (len(places) - 1) / (_MOST_ROWS - 1))] for i in range(_MOST_ROWS)]
    return {
        "title": chart.title,
        "ends": f"{chart.title}: {'; '.join(ends)}",
        "x": chart.x,
        "y": chart.y,
        "across": [(round(across(tick), 1), _brief(tick)) for tick in x_ticks],
        "upward": [(round(upward(tick), 1), _brief(tick)) for tick in y_ticks],
        "lines": lines,
        "head": [chart.x, *(curve.label for curve in curves)],
        "rows": [[_brief(x), *(f"{curve[x]:.4g}" if x in curve else "-" for curve in known)] for x in places],
    }


def _linear(values: Sequence[float], first: float, last: float) -> tuple[_Place, list[float]]:
    """Where values lie in the picture, and those to write beside it."""
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= 5)
    ticks = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return lambda value: first + (value - low) / (high - low) * (last - first), ticks


def _logarithmic(values: Sequence[float]) -> tuple[_Place, list[float]]:
    powers = [math.log2(max(value, 1)) for value in values]
    place, _ = _linear(powers, _LEFT, _RIGHT)
    every = max(math.ceil((max(powers) - min(powers)) / 6), 1)
    ticks = [2.0**power for power in range(math.ceil(min(powers)), math.floor(max(powers)) + 1, every)]
    return lambda value: place(math.log2(max(value, 1))), ticks


def _brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
