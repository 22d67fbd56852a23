"""Curves as inline SVG, each with a table of its numbers for those who cannot see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from memorizing_transformers_pytorch.explorer.markup import cell, number, shown, table

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 470, 12, 252
_DASHES = ("none", "7 4", "2 4", "10 3 2 3", "14 5", "4 2 1 2")  # colour alone would not tell curves apart
_MOST_ROWS = 24


class Curve(NamedTuple):
    """Points in the order of x."""

    label: str
    points: Sequence[tuple[float, float]]


class _Axis(NamedTuple):
    """place: of a value in the picture. ticks: values to write beside it."""

    place: Callable[[float], float]
    ticks: list[float]


def chart(title: str, curves: Sequence[Curve], x: str, y: str, *, log: bool = False) -> str:
    """A figure, or nothing if there is no point. x, y: what the axes show. log: x by powers of two."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    along, up = [p[0] for c in curves for p in c.points], [p[1] for c in curves for p in c.points]
    across = _logarithmic(along) if log else _linear(along, _LEFT, _RIGHT)
    upward = _linear(up, _BOTTOM, _TOP)
    ends = "; ".join(f"{c.label} from {_brief(c.points[0][1])} to {_brief(c.points[-1][1])}" for c in curves)
    return (
        f"<figure><figcaption>{shown(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{shown(f"{title}: {ends}")}">'
        f"{_axes(across, upward, x, y)}{''.join(_drawn(i, c, across, upward) for i, c in enumerate(curves))}</svg>"
        f'<p class="legend">{"".join(_key(i, c.label) for i, c in enumerate(curves))}</p>'
        f"<details><summary>Numbers</summary>{_numbers(title, curves, x)}</details></figure>"
    )


def _linear(values: Sequence[float], first: float, last: float) -> _Axis:
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= 5)
    ticks = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return _Axis(lambda value: first + (value - low) / (high - low) * (last - first), ticks)


def _logarithmic(values: Sequence[float]) -> _Axis:
    powers = [math.log2(max(value, 1)) for value in values]
    inner = _linear(powers, _LEFT, _RIGHT)
    every = max(math.ceil((max(powers) - min(powers)) / 6), 1)
    ticks = [2.0**power for power in range(math.ceil(min(powers)), math.floor(max(powers)) + 1, every)]
    return _Axis(lambda value: inner.place(math.log2(max(value, 1))), ticks)


def _axes(across: _Axis, upward: _Axis, x: str, y: str) -> str:
    parts = [f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{shown(f"{x} →")}</text>']
    for tick in upward.ticks:
        place = upward.place(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {place:.1f}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place + 5:.1f}" text-anchor="end">{_brief(tick)}</text>')
    for tick in across.ticks:
        place = across.place(tick)
        parts.append(f'<path class="grid" d="M{place:.1f} {_BOTTOM}v5"/>')
        anchor = "end" if place > _RIGHT - 15 else "middle"
        parts.append(f'<text x="{place:.1f}" y="{_BOTTOM + 20}" text-anchor="{anchor}">{_brief(tick)}</text>')
    parts.append(f'<text x="{_RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{shown(f"↑ {y}")}</text>')
    return "".join(parts)


def _drawn(i: int, curve: Curve, across: _Axis, upward: _Axis) -> str:
    points = [f"{across.place(x):.1f} {upward.place(y):.1f}" for x, y in curve.points]
    if len(points) == 1:
        return f'<path class="curve s{_color(i)}" stroke-linecap="square" stroke-width="8" d="M{points[0]}h.1"/>'
    line = "L".join(points)
    return f'<path class="curve s{_color(i)}" stroke-dasharray="{_DASHES[i % len(_DASHES)]}" d="M{line}"/>'


def _color(i: int) -> int:
    """Of six, so that more curves than those get other dashes with it."""
    return (i + i // len(_DASHES)) % 6


def _key(i: int, label: str) -> str:
    sample = f'<path class="curve s{_color(i)}" stroke-dasharray="{_DASHES[i % len(_DASHES)]}" d="M0 5H40"/>'
    return f'<span><svg class="key" viewBox="0 0 40 10" aria-hidden="true">{sample}</svg> {shown(label)}</span>'


def _numbers(title: str, curves: Sequence[Curve], x: str) -> str:
    """Of many points, some that are evenly spread."""
    known = [dict(curve.points) for curve in curves]
    places = sorted({place for curve in known for place in curve})
    if len(places) > _MOST_ROWS:
        places = [places[round(i * (len(places) - 1) / (_MOST_ROWS - 1))] for i in range(_MOST_ROWS)]
    rows = [cell(_brief(place)) + "".join(number(curve.get(place), "{:.4g}") for curve in known) for place in places]
    return table(title, (x, *(curve.label for curve in curves)), rows)


def _brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
