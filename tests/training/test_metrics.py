"""Metrics: every step is written once, also after an interruption, and any reader can read them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers_pytorch.training.metrics import Metrics, ProgressBar, read_metrics, training_charts
from memorizing_transformers_pytorch.training.trainer import Step
from memorizing_transformers_pytorch.utils.charts import save_png


def record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step}


def test_records_come_back_in_order(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl", step=0) as metrics:
        for step in (1, 2, 3):
            metrics.note(record(step))
    assert read_metrics(tmp_path / "metrics.jsonl") == [record(step) for step in (1, 2, 3)]


def test_what_came_after_the_step_of_resumption_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, step=0) as metrics:
        for step in (1, 2, 3, 4):
            metrics.note(record(step))
    path.write_text(path.read_text() + '{"step": 5, "lo')  # a line that was cut off
    with Metrics(path, step=2) as metrics:
        metrics.note(record(3))
    assert [found["step"] for found in read_metrics(path)] == [1, 2, 3]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with Metrics(tmp_path / "metrics.jsonl", step=0) as metrics:
        metrics.note({"step": 1, "loss": math.nan, "memory": {"mass": [math.inf, 0.5]}})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "memory": {"mass": [None, 0.5]}}


def test_a_file_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_gets_every_number_by_name(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Metrics(tmp_path / "metrics.jsonl", step=0, tensorboard=tmp_path / "tensorboard") as metrics:
        metrics.note({"step": 7, "loss": 2.5, "memory": {"layer 2": {"mass": [0.25, 0.75]}}})
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(7, 2.5)]
    assert found.Scalars("memory/layer 2/mass/1")[0].value == 0.75


def test_a_step_becomes_bits_per_byte_and_tokens_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    step = Step(5, 2 * math.log(2), 900, 1e-3, 1.0, 64.0, 2.0, 0.5)
    with ProgressBar(step=4, steps=10, bytes_per_token=4.0, disable=False) as bar:
        found = bar.record(step, 700)
        bar.show(found, 2 * math.log(2), capacity=128)
    assert found["bits_per_byte"] == pytest.approx(0.5)
    assert found["tokens_per_second"] == 100
    assert found["searching"] == 0.25
    printed = capsys.readouterr().err
    assert all(word in printed for word in ("5/10", "bits/byte=0.500", "memory=50%", "searching=25%"))


def test_curves_are_drawn_with_and_without_memory_and_for_no_steps(tmp_path: Path) -> None:
    steps = [
        {"step": n, "loss": 3.0, "tokens_per_second": 5.0, "searching": 0.1, "memory": {"layer 1": seen}}
        for n, seen in enumerate(({}, {"mass": [0.1, 0.2], "age": [1, 5, 9]}, {"mass": [0.2, 0.3]}), start=1)
    ]
    validation = {"step": 3, "validation": {"off": 3.0, "64": 2.5}}
    for number, records in enumerate(([], steps[:1], [*steps, validation])):
        path = tmp_path / f"{number}.png"
        save_png(training_charts(records, 2), path)
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("line", ["", "{", "[1]", "{}", '{"step": "1"}', "[" * 100_000])
def test_a_line_that_is_no_record_is_refused_and_the_file_kept(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"expected .* in .*metrics\.jsonl', line 2, got "):
        Metrics(path, step=5)
    assert path.read_bytes() == before
