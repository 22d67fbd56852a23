"""The page of a run: how it was trained, what its memory is worth, and what it looks up on unseen text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memorizing_transformers_pytorch.evaluation.report import evaluation_charts, label
from memorizing_transformers_pytorch.explorer.charts import drawn
from memorizing_transformers_pytorch.explorer.explanation import Explanation
from memorizing_transformers_pytorch.explorer.markup import ENVIRONMENT, write
from memorizing_transformers_pytorch.explorer.page import SECTIONS, View
from memorizing_transformers_pytorch.training.metrics import Record, read_metrics, training_charts
from memorizing_transformers_pytorch.utils.plain_json import read_object

REPORT = "report.html"


def write_run_page(folder: Path, found: Explanation | None, about: str = "") -> Path:
    """Write report.html from metrics.jsonl and, where there is one, evaluation/evaluation.json.

    found: what was looked up in the text that `about` describes.
    """
    evaluation = folder / "evaluation" / "evaluation.json"
    results = read_object(evaluation) if evaluation.is_file() else None
    records = read_metrics(folder / "metrics.jsonl")
    write(folder / REPORT, run_page(f"Run {folder.resolve().name}", records, results, found, about))
    return folder / REPORT


def run_page(
    title: str, records: Sequence[Record], results: Mapping[str, Any] | None, found: Explanation | None, about: str
) -> str:
    """The page; without an evaluation or an explanation, the rest of it."""
    worth = {} if results is None else {"worth": "What the memory is worth"}
    return ENVIRONMENT.get_template("run.html").render(
        title=title,
        sections={"training": "Training", **worth, **({} if found is None else SECTIONS)},
        training=drawn(training_charts(records)),
        results=results,
        evaluation=[] if results is None else drawn(evaluation_charts(results)),
        label=label,
        view=None if found is None else View(found),
        about=about,
    )
