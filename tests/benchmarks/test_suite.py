"""The measurements run, at sizes that tell nothing; what is made of their results is right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measurements, ours
from benchmarks.judging import recall, sampled
from benchmarks.measurements import MEASUREMENTS, exponent, summaries
from benchmarks.page import SECTIONS, write_page
from benchmarks.race import Contestant, race, summary
from benchmarks.targets import GPU_TARGETS, at_equal_recall, measured
from memorizing_transformers_pytorch.evaluation.provenance import provenance

ECHO = """
import sys
sys.path.insert(0, {folder!r})
from serving import serve
def build(number):
    print("whatever a library prints")
    return lambda: {{"number": number, "list": [number]}}
serve({{"echo": build}})
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parent.parent.parent / "benchmarks"
    (tmp_path / "echo.py").write_text(ECHO.format(folder=str(folder)))
    monkeypatch.setattr("benchmarks.race.HERE", tmp_path)


@pytest.mark.usefixtures("echo")
def test_every_contestant_answers_in_every_round(capfd: pytest.CaptureFixture[str]) -> None:
    racers = {str(number): Contestant("echo.py", "echo", {"number": number}) for number in range(3)}
    found = race(racers, rounds=2)
    assert {name: [record["number"] for record in records] for name, records in found.items()} == {
        "0": [0, 0],
        "1": [1, 1],
        "2": [2, 2],
    }
    for records in found.values():
        assert all(record["seconds"] >= 0 and record["peak_bytes"] > 1_000_000 for record in records)
    rounds = [line.split()[2] for line in capfd.readouterr().out.splitlines() if "round" in line]
    assert len(rounds) == 6
    assert rounds[:3] != rounds[3:]  # the order turns


@pytest.mark.usefixtures("echo")
def test_a_contestant_that_fails_ends_the_race() -> None:
    with pytest.raises(RuntimeError, match="ended with 1"):
        race({"bad": Contestant("echo.py", "echo", {"wrong": 1})}, rounds=1)


def test_medians_and_ranges() -> None:
    records = [{"seconds": value, "index": f"last {value}"} for value in (3.0, 1.0, 8.0)]
    assert summary(records) == {"median": 3.0, "least": 1.0, "most": 8.0, "rounds": 3}
    found = summaries({"one": records}, "seconds", "index", "absent")
    assert found == {"one": {"seconds": summary(records), "index": "last 8.0"}}


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_is_the_slope_in_logarithms(power: float) -> None:
    sizes = [1, 2, 4, 8]
    assert exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


@pytest.mark.parametrize("times", [1, 100])
def test_bfloat16_is_measured_where_it_is_not_far_slower(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    raced: list[str] = []
    monkeypatch.setattr(measurements, "seconds_of_products", lambda dtype: times if dtype == torch.bfloat16 else 1.0)
    monkeypatch.setattr(measurements.Setting, "race", lambda _, racers, rounds=None: raced.extend(racers) or {})
    setting = measurements.Setting(quick=True, original="", vectors="", folder=Path())
    measurements.step(setting)
    measurements.space(setting)
    assert any("bf16" in name for name in raced) == (times == 1)


SMALL: list[tuple[str, dict[str, Any]]] = [
    ("step", {"entries": 700, "rows": 1}),
    ("step", {"entries": 0, "rows": 1, "bf16": True}),
    ("step", {"entries": 700, "rows": 1, "parts": True}),
    ("look_up", {"entries": 1_500, "segment": 20, "heads": 2, "index": "IVF4,Flat"}),
    ("look_up", {"entries": 100, "rows": 2, "segment": 700}),
    ("sweep", {"entries": 1_500, "index": "IVF4,Flat", "efforts": [1, 4]}),
    ("write", {"entries": 600, "batch": 2, "tokens": 3}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("action", "options"), SMALL)
def test_ours_does_what_is_measured(action: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if action == "step":
        monkeypatch.setattr(ours, "SEGMENT", 64)  # the whole of it takes long, above all in bfloat16
    record = getattr(ours, action)(**options)()
    if options.get("parts"):
        assert all(record["parts"][name] > 0 for name in ("products", "search", "attend", "add", "rest"))
    elif action == "sweep":
        assert record["points"][0]["recall"] < record["points"][1]["recall"] == 1.0
    elif action == "look_up":
        assert record["seconds"] == pytest.approx(record["add"] + record["search"])
        assert 0.9 < record["recall"] <= 1
        assert min(record["retrieve"], record["build"], record["fill"]) > 0
    else:
        assert record["tokens_per_second" if action == "write" else "seconds"] > 0


@pytest.mark.slow
def test_ours_answers_in_a_process_of_its_own() -> None:
    (record,) = race({"ours": Contestant("ours.py", "product", {"entries": 9_000})}, rounds=1, warm_up=0)["ours"]
    assert record["seconds"] > 0


@pytest.mark.parametrize("entries", [7, 300])
def test_all_are_judged_alike_by_the_scores_of_what_they_find(entries: int) -> None:
    random = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(entries, 4, generator=random), torch.randn(2, 200, 4, generator=random)
    some = sampled(queries)
    assert some.shape == (256, 4)
    assert torch.equal(sampled(queries[0]), queries[0])
    scores = (some @ keys.T).sort(descending=True).values
    assert recall(scores[:, :5], some, keys) == 1.0
    scores[:, 4] = scores[:, 5] if entries > 5 else -torch.inf
    assert recall(scores[:, :5], some, keys) == pytest.approx(0.8)
    scores[:, 3] = -torch.inf  # what was not found
    assert recall(scores[:, :5], some, keys) == pytest.approx(0.6)


def test_the_page_shows_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    def value(number: float) -> dict[str, float]:
        return {"median": number, "least": number, "most": number, "rounds": 1}

    def racer(seconds: float, recall: float | None = None) -> dict[str, Any]:
        parts = {name: value(seconds / 2) for name in ("add", "search")} | {"retrieve": value(seconds / 4)}
        rest = {"recall": value(1.0 if recall is None else recall)}
        return {"seconds": value(seconds), "peak_bytes": value(seconds * 2**30), "index": "i", **parts, **rest}

    look_up = {
        "8192 trained": {
            "exact": racer(2.0),
            "auto": racer(1.0, 0.96),
            "original, efSearch 16": racer(1.5, 0.5),
            "original, efSearch 64": racer(5.0, 0.97),
            "original, efSearch 256": racer(9.0, 0.99),
        }
    }
    results: dict[str, Any] = {
        "step": {
            "found": {"rows": 2, "0": racer(2.0), "8192": racer(2.2), "7680": racer(2.2), "original": racer(11.0)}
        },
        "look_up": {"found": look_up},
        "space": {
            "found": {
                f"2 {name}": {"step_bytes": value(size), "peak_bytes": value(size)}
                for name, size in (("ours", 5e8), ("original", 2e9))
            }
        },
        "parts": {"found": {"0": {"search": 0.0, "attend": 0.0, "add": 0.0, "products": 1.0, "rest": 1.0}}},
        "sweep": {"found": {"65536": {"exact": [{"recall": 1.0, "seconds": 1.0}]}}},
    }
    for each in results.values():
        each.update(quick=False, **provenance(torch.device("cpu")))
    shown = {measure: value for measure, _, value in measured(results)}
    assert shown["step, 8K full / no memory"] == "1.10 (exact)"
    assert shown["step, original / ours at 7,680 full"] == "5.00"
    assert shown["memory of that step at most, 2 rows, ours / original"] == "0.25"
    assert shown["step, 262K full / no memory"] is None
    assert len(shown) == len(GPU_TARGETS)
    assert at_equal_recall(look_up, 8_192, "search") == "5.0 (original, efSearch 64: recall 0.97; ours, auto: 0.96)"
    assert at_equal_recall(look_up, 8_192, "retrieve") == "6.7 (original, efSearch 64: recall 0.97; ours, auto: 0.96)"
    write_page(results, tmp_path / "performance.md", {"step": results["step"]}, "Notes by hand.\n")
    page = (tmp_path / "performance.md").read_text()
    assert "| step, 8K full / no memory | <= 1.15 | 1.10 (exact) | <= 1.10 | 1.10 (exact) |" in page
    assert "Notes by hand." in page
    assert "not measured" in page
    assert {path.name for path in (tmp_path / "performance").iterdir()} == {"step.png", "recall.png"}
    assert set(SECTIONS) == set(MEASUREMENTS)


def test_the_package_imports_nothing_that_it_may_not_need() -> None:
    import subprocess

    heavy = "accelerate, datasets, gradio, matplotlib, tensorboard, tokenizers, transformers, tyro"
    code = f"import sys, memorizing_transformers_pytorch; print([n for n in '{heavy}'.split(', ') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
