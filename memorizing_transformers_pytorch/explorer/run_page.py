"""The page of a run: how it was trained, what its memory is worth, and what it looks up on unseen text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from memorizing_transformers_pytorch.evaluation.report import label
from memorizing_transformers_pytorch.explorer.charts import Curve, chart
from memorizing_transformers_pytorch.explorer.explanation import Explanation
from memorizing_transformers_pytorch.explorer.markup import cell, number, shown, table, whole_page
from memorizing_transformers_pytorch.explorer.page import SECTIONS, sections
from memorizing_transformers_pytorch.training.metrics import Record, read_metrics
from memorizing_transformers_pytorch.utils.durable import replacing
from memorizing_transformers_pytorch.utils.plain_json import read_object

REPORT = "report.html"
_POINTS = 200  # of a curve


def write_run_page(folder: Path, found: Explanation | None, about: str = "") -> Path:
    """Write report.html from metrics.jsonl and, where there is one, evaluation/evaluation.json.

    found: what was looked up, of the text that `about` tells.
    """
    evaluation = folder / "evaluation" / "evaluation.json"
    results = read_object(evaluation) if evaluation.is_file() else None
    page = run_page(f"Run {folder.resolve().name}", read_metrics(folder / "metrics.jsonl"), results, found, about)
    with replacing(folder / REPORT) as aside:
        aside.write_text(page, encoding="utf-8")
    return folder / REPORT


def run_page(
    title: str, records: Sequence[Record], evaluation: Mapping[str, Any] | None, found: Explanation | None, about: str
) -> str:
    """The page; without an evaluation or an explanation, the rest of it."""
    parts = {"training": ("Training", f'<div class="charts">{_training(records)}</div>')}
    if evaluation is not None:
        parts["worth"] = ("What the memory is worth", _worth(evaluation))
    written = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{words}</h2>{part}</section>'
        for name, (words, part) in parts.items()
    )
    links = {name: words for name, (words, _) in parts.items()}
    if found is not None:
        links |= SECTIONS
        written += f"<section><h2>What was looked up</h2><p>{shown(about)}</p></section>{sections(found)}"
    items = "".join(f'<li><a href="#{name}">{words}</a></li>' for name, words in links.items())
    nav = f'<nav aria-label="On this page"><ul>{items}</ul></nav>'
    return whole_page(title, f"<header><h1>{shown(title)}</h1>{nav}</header><main>{written}</main>")


def _training(records: Sequence[Record]) -> str:
    losses = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validations = [r for r in records if "validation" in r]
    curves = [Curve("training", _means(losses))]
    for name in sorted({name for r in validations for name in r["validation"]}, key=_order):
        points = [(r["step"], r["validation"][name]) for r in validations if r["validation"].get(name) is not None]
        curves.append(Curve(f"validation, {_words(name)}", points))
    logged = [r for r in records if "memory" in r]
    drawn = [chart("Loss", curves, "step", "nats per token")]
    for key, words, unit in (
        ("mass", "Attention on the memory, by head", "share"),
        ("gate", "Gate, by head", "share of the memory"),
        ("temperature", "Temperature, by head", "factor of the scores"),
    ):
        drawn.append(chart(words, _of_heads(logged, key), "step", unit))
    drawn.append(chart("Age of what is retrieved", _ages(logged), "step", "tokens"))
    return "".join(drawn) or "<p>Nothing was written down.</p>"


def _of_heads(logged: Sequence[Record], key: str) -> list[Curve]:
    curves = []
    for layer in _layers(logged):
        points = [(r["step"], r["memory"][layer][key]) for r in logged if key in r["memory"].get(layer, {})]
        for head in range(len(points[0][1]) if points else 0):
            own = [(step, values[head]) for step, values in points if len(values) > head and values[head] is not None]
            curves.append(Curve(f"{layer}, head {head}", _means(own)))
    return curves


def _ages(logged: Sequence[Record]) -> list[Curve]:
    curves = []
    for layer in _layers(logged):
        points = [(r["step"], r["memory"][layer]["age"]) for r in logged if "age" in r["memory"].get(layer, {})]
        for i, words in enumerate(("10%", "median", "90%")):
            curves.append(Curve(f"{layer}, {words}", _means([(step, ages[i]) for step, ages in points])))
    return curves


def _layers(logged: Sequence[Record]) -> list[str]:
    return sorted({layer for r in logged for layer in r["memory"]})


def _means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of many points, means of neighbours."""
    size = max(len(points) // _POINTS, 1)
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]


def _worth(evaluation: Mapping[str, Any]) -> str:
    modes = evaluation["modes"]
    rows = [
        cell(shown(_words(name)))
        + number(mode["loss"]["value"])
        + number(mode["perplexity"]["value"], "{:.2f}")
        + cell("" if name == "off" else shown(_with_interval(mode["change"])))
        for name, mode in modes.items()
    ]
    head = ("memory", "loss, nats per token", "perplexity", "perplexity against off")
    documents = len(evaluation["documents"])
    step = evaluation["step"]
    found = table(f"At step {step:,}, on {documents:,} held-out documents; in brackets 95% intervals", head, rows)
    verdicts = "".join(
        f"<li>{shown(label(name))}: {each['loss_above_right_memory']['value']:+.3f} nats per token above the right "
        f"memory ({shown(each['verdict'])})</li>"
        for name, each in evaluation["controls"].items()
    )
    controls = f"<p>Memories that should be of no use:</p><ul>{verdicts}</ul>" if verdicts else ""
    return f'{found}{controls}<div class="charts">{_by_size(modes)}{_by_position(evaluation["positions"])}</div>'


def _by_size(modes: Mapping[str, Any]) -> str:
    sizes = sorted((name for name in modes if name.isdigit()), key=int)
    own = [(float(name), modes[name]["perplexity"]["value"]) for name in sizes]
    off = [(size, modes["off"]["perplexity"]["value"]) for size, _ in own]
    curves = [Curve("memory off", off), Curve("own memory", own)]
    return chart("By size of the memory", curves, "entries", "perplexity", log=True)


def _by_position(positions: Mapping[str, Any]) -> str:
    edges = positions["edges"]
    middles = [(max(low, 1) * high) ** 0.5 for low, high in pairwise(edges)]
    curves = [
        Curve(_words(name), list(zip(middles, positions["losses"][name], strict=True)))
        for name in sorted(positions["losses"], key=_order)
    ]
    return chart("By position in the document", curves, "tokens read before", "nats per token", log=True)


def _with_interval(change: Mapping[str, Any]) -> str:
    ends = change["interval"]
    return f"{change['value']:+.1%}" + (f" [{ends[0]:+.1%}, {ends[1]:+.1%}]" if ends else "")


def _words(mode: str) -> str:
    return "memory off" if mode == "off" else label(mode)


def _order(mode: str) -> tuple[int, int, str]:
    """Off, then sizes, then controls."""
    return (1, int(mode), "") if mode.isdigit() else (0 if mode == "off" else 2, 0, mode)
