"""An evaluation for people: a table with a sentence for each control, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memorizing_transformers_pytorch.evaluation.controls import CONTROLS
from memorizing_transformers_pytorch.evaluation.summary import Estimate, Summary, verdict

_CONTROL_LABELS = {
    "other": "another document's memory",
    "shuffled": "own memory, values shuffled",
    "random keys": "own memory, random keys",
}
_HEADER = (
    "memory",
    "loss (nats per token)",
    "perplexity",
    "bits per byte",
    "perplexity against off",
    "better than off",
)
_CONTROL_COLORS = dict(zip(CONTROLS, ("tab:orange", "tab:red", "tab:purple"), strict=True))
_CONTROL_MARKERS = dict(zip(CONTROLS, "^sD", strict=True))


def label(mode: str) -> str:
    """What people call a mode."""
    if mode == "off":
        return "off"
    return _CONTROL_LABELS.get(mode) or f"{int(mode):,} entries"


def markdown(summary: Summary, title: str, what: str, *, warning: str | None = None, origin: str | None = None) -> str:
    """The whole report.

    what: a sentence on the documents and the weights that were evaluated. warning: why the numbers may not mean what
    they seem to. origin: of the numbers: weights, code and machine.
    """
    documents, tokens = len(summary.names), sum(summary.tokens)
    scope = f"{documents} {'document' if documents == 1 else 'documents'}, {tokens:,} tokens, each read in order."
    if documents > 1:
        brackets = "In brackets: 95% intervals, by drawing documents anew; those against off are paired."
    else:
        brackets = "One document, so there are no intervals and no memory of another one."
    brackets = f"The same weights, local context and XL memory in each line. {brackets}"
    warnings = [] if warning is None else [f"**Warning:** {warning}."]
    parts = [f"# {title}", f"{what} {scope}", *warnings, table(summary), brackets]
    if summary.controls:
        parts += [f"Controls, against the memory of {summary.controls_at:,} entries:", control_sentences(summary)]
    if origin is not None:
        parts.append(origin)
    return "\n\n".join(parts) + "\n"


def table(summary: Summary) -> str:
    """Markdown, with cells of the same width."""
    lines = [_HEADER]
    for name, mode in summary.modes.items():
        off, documents = name == "off", len(summary.names)
        lines.append(
            (
                label(name),
                _with_interval(mode.loss, "{:.3f}"),
                f"{mode.perplexity.value:.2f}",
                "-" if mode.bits_per_byte is None else f"{mode.bits_per_byte:.3f}",
                "" if off else _with_interval(mode.change, "{:+.1%}"),
                "" if off else f"{mode.better_documents} of {documents}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    rows = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {row} |" for row in (rows[0], rule, *rows[1:]))


def _with_interval(estimate: Estimate, form: str) -> str:
    if estimate.interval is None:
        return f"{form.format(estimate.value)} [-]"
    low, high = estimate.interval
    return f"{form.format(estimate.value)} [{form.format(low)}, {form.format(high)}]"


def control_sentences(summary: Summary) -> str:
    """Of each control, whether it is worse than the right memory, as it must be if that is what helps."""
    return "\n".join(f"- {_sentence(label(name), found)}" for name, found in summary.controls.items())


def _sentence(name: str, difference: Estimate) -> str:
    name = name[0].upper() + name[1:]
    if verdict(difference) == "worse":
        return f"{name} is worse than the right memory by {_with_interval(difference, '{:.3f}')} nats per token."
    found = f"the difference is {_with_interval(difference, '{:+.3f}')} nats per token"
    if verdict(difference) == "not worse":
        return f"{name} is NOT shown to be worse than the right memory: {found}."
    return f"{name}: {found}; from one document nothing follows for others."


def plot(summary: Summary, segment_length: int, path: Path) -> None:
    """Perplexity by memory size, and loss by position in the document, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    by_size, by_position = figure.subplots(1, 2)
    _plot_by_size(by_size, summary)
    _plot_by_position(by_position, summary, segment_length)
    for axes in (by_size, by_position):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _sizes(summary: Summary) -> list[str]:
    return sorted((name for name in summary.modes if name.isdigit()), key=int)


def _plot_by_size(axes: Any, summary: Summary) -> None:
    """Bands and bars are the paired intervals of the change against off: off itself has none."""
    off = summary.modes["off"].perplexity.value
    axes.axhline(off, color="tab:gray", linestyle="--", label="memory off")
    names = _sizes(summary)
    if names:
        sizes = [int(name) for name in names]
        axes.plot(sizes, _perplexities(summary, names), marker="o", color="tab:blue", label="own memory")
        low, high = _ends(summary, names, off)
        axes.fill_between(sizes, low, high, color="tab:blue", alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    for name in summary.controls:
        [value] = _perplexities(summary, [name])
        low, high = _ends(summary, [name], off)
        style = {"marker": _CONTROL_MARKERS[name], "color": _CONTROL_COLORS[name], "linestyle": "none", "capsize": 3}
        bars = np.abs(np.array([low, high]) - value)
        axes.errorbar([summary.controls_at], [value], yerr=bars, label=label(name), **style)
    change = axes.secondary_yaxis("right", functions=(lambda y: 100 * (y / off - 1), lambda y: off * (1 + y / 100)))
    change.set_ylabel("change against memory off (%)")
    title = "By size of the memory" + (" (95% intervals of the change)" if len(summary.names) > 1 else "")
    axes.set(xlabel="entries of the memory", ylabel="perplexity per token", title=title)


def _perplexities(summary: Summary, names: Sequence[str]) -> list[float]:
    return [summary.modes[name].perplexity.value for name in names]


def _ends(summary: Summary, names: Sequence[str], off: float) -> tuple[list[float], list[float]]:
    """Perplexities at the ends of the intervals; the value itself where there is none."""
    changes = [summary.modes[name].change for name in names]
    ends = [change.interval or (change.value, change.value) for change in changes]
    return [off * (1 + low) for low, _ in ends], [off * (1 + high) for _, high in ends]


def _plot_by_position(axes: Any, summary: Summary, segment_length: int) -> None:
    """Over ranges of positions that more than one document has, if there is more than one."""
    positions = summary.positions
    least = min(len(summary.names), 2)
    shown = [i for i, documents in enumerate(positions.documents) if documents >= least]
    middles = [(positions.edges[i] * positions.edges[i + 1]) ** 0.5 or positions.edges[i + 1] / 2 for i in shown]
    sizes = _sizes(summary)
    colors = {"off": "tab:gray"} | _CONTROL_COLORS
    for name, losses in positions.losses.items():
        style: dict[str, Any] = {"color": colors.get(name), "linestyle": ":" if name in _CONTROL_COLORS else "-"}
        if name in sizes:
            style |= {"color": "tab:blue", "alpha": 0.3 + 0.7 * (sizes.index(name) + 1) / len(sizes)}
        elif name == "off":
            style["linestyle"] = "--"
        axes.plot(middles, [losses[i] for i in shown], label=label(name) if name != "off" else "memory off", **style)
    axes.axvline(segment_length, color="black", linewidth=0.8, linestyle=":", label="end of the first segment")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(
        xlabel="tokens of the document already read",
        ylabel="loss (nats per token)",
        title="By position in the document",
    )
