"""An evaluation for people: a table, a sentence for each control, and charts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from memorizing_transformers_pytorch.evaluation.summary import Estimate, Summary, verdict
from memorizing_transformers_pytorch.utils.charts import Chart, Curve

_LABELS = {
    "off": "memory off",
    "other": "another document's memory",
    "shuffled": "own memory, values shuffled",
    "random keys": "own memory, random keys",
    "memory": "memory on",
}
_HEADER = (
    "memory",
    "loss (nats per token)",
    "perplexity",
    "bits per byte",
    "perplexity against off",
    "better than off",
)


def label(mode: str) -> str:
    """What people call a mode."""
    return _LABELS.get(mode) or f"{int(mode):,} entries"


def order(mode: str) -> tuple[int, int, str]:
    """A sort key of modes: off, then sizes, then controls."""
    return (1, int(mode), "") if mode.isdigit() else (0 if mode == "off" else 2, 0, mode)


SAME = "The same weights, local context and XL memory in each line."


def markdown(
    summary: Summary,
    title: str,
    what: str,
    *,
    warning: str | None = None,
    origin: str | None = None,
    same: str = SAME,
) -> str:
    """The whole report.

    what: a sentence on the documents and the weights that were evaluated. warning: why the numbers may not mean what
    they seem to. origin: of the numbers: weights, code and machine. same: what the lines of the table have in common.
    """
    documents, tokens = len(summary.names), sum(summary.tokens)
    scope = f"{documents} {'document' if documents == 1 else 'documents'}, {tokens:,} tokens, each read in order."
    if documents > 1:
        brackets = "In brackets: 95% intervals, by the bootstrap over documents; those against off are paired."
    else:
        brackets = "One document, so there are no intervals and no memory of another one."
    brackets = f"{same} {brackets}"
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
                "off" if off else label(name),
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


def evaluation_charts(results: Mapping[str, Any]) -> list[Chart]:
    """Perplexity by memory size, with the 95% intervals of the change against off; loss by position in the document.

    results: as `Summary.to_dict` gives them, and the segment_length.
    """
    modes, at = results["modes"], results["controls_at"]
    sizes, off = sorted((name for name in modes if name.isdigit()), key=int), modes["off"]["perplexity"]["value"]

    def curve(name: str, places: Mapping[str, int]) -> Curve:
        points = [(size, modes[mode]["perplexity"]["value"]) for mode, size in places.items()]
        intervals = [modes[mode]["change"]["interval"] for mode in places]
        return Curve(name, points, [(off * (1 + i[0]), off * (1 + i[1])) for i in intervals if i])

    own = curve("own memory", {name: int(name) for name in sizes})
    by_size = [Curve("memory off", [(size, off) for size, _ in own.points]), own]
    by_size += [curve(label(name), {name: at}) for name in results["controls"]]
    positions = results["positions"]
    middles = [(max(low, 1) * high) ** 0.5 for low, high in pairwise(positions["edges"])]
    kept = [i for i, count in enumerate(positions["documents"]) if count >= min(len(results["documents"]), 2)]
    by_position = [
        Curve(label(name), [(middles[i], positions["losses"][name][i]) for i in kept])
        for name in sorted(positions["losses"], key=order)
    ]
    mark = (results["segment_length"], "end of the first segment")
    return [
        Chart("By size of the memory", "entries", "perplexity", by_size, log=True),
        Chart("By position in the document", "tokens read before", "nats per token", by_position, log=True, mark=mark),
    ]
