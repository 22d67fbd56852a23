"""Numbers, sentences and plot of an evaluation, from losses made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from memorizing_transformers_pytorch.evaluation.evaluate import Losses
from memorizing_transformers_pytorch.evaluation.report import control_sentences, evaluation_charts, markdown, table
from memorizing_transformers_pytorch.evaluation.summary import Summary, by_position, summarise
from memorizing_transformers_pytorch.utils.charts import save_png

LENGTHS = (5, 40, 17, 90)


def make_losses(*lengths: int, **gains: float) -> Losses:
    """Losses around 3 with memory off, and lower by so much in each other mode."""
    random = np.random.default_rng(0)
    off = [random.normal(3, 0.3, length).astype(np.float32) for length in lengths]
    noise = [random.normal(0, 0.01, length).astype(np.float32) for length in lengths]
    modes = {m: [a - np.float32(gain) + b for a, b in zip(off, noise, strict=True)] for m, gain in gains.items()}
    return {"off": off} | {mode.removeprefix("size").replace("_", " "): of_mode for mode, of_mode in modes.items()}


def make_summary(*lengths: int, **gains: float) -> Summary:
    gains = gains or {"size512": 0.2, "size2048": 0.3, "other": 0.1, "shuffled": 0.3, "random_keys": -0.1}
    names = [f"document {number}" for number in range(len(lengths))]
    losses, controls_at = make_losses(*lengths, **gains), 2048
    return summarise(losses, names=names, num_bytes=[3 * n for n in lengths], controls_at=controls_at, draws=200)


def test_means_are_over_tokens_and_all_that_follows_from_them() -> None:
    losses, summary = make_losses(*LENGTHS, size512=0.2), make_summary(*LENGTHS, size512=0.2)
    off, on = (np.concatenate(losses[mode]).mean(dtype=np.float64) for mode in ("off", "512"))
    mode = summary.modes["512"]
    assert mode.loss.value == pytest.approx(on)
    assert mode.perplexity.value == pytest.approx(math.exp(on))
    assert mode.bits_per_byte == pytest.approx(on / math.log(2) / 3)
    assert mode.change.value == pytest.approx(math.exp(on) / math.exp(off) - 1)
    assert mode.better_documents == 4
    assert summary.modes["off"].change.value == 0
    assert summary.document_losses["512"] == pytest.approx([loss.mean() for loss in losses["512"]], abs=1e-6)


def test_intervals_hold_the_value_and_paired_ones_are_narrower() -> None:
    mode = make_summary(*LENGTHS).modes["512"]
    for estimate in (mode.loss, mode.perplexity, mode.change):
        assert estimate.interval.low <= estimate.value <= estimate.interval.high
    loss_width = mode.loss.interval.high - mode.loss.interval.low
    change_width = mode.change.interval.high - mode.change.interval.low
    assert change_width < loss_width / 3


def test_documents_without_losses_are_left_out() -> None:
    with_empty, without = make_summary(5, 0, 40), make_summary(5, 40)
    assert with_empty.names == ["document 0", "document 2"]
    assert with_empty.tokens == without.tokens == [5, 40]


def test_loss_by_position_is_that_of_tokens_there() -> None:
    losses = make_losses(*LENGTHS, size512=0.2)
    positions = by_position(losses)
    assert positions.edges == [0, 16, 23, 32, 45, 64, 90]
    assert positions.documents == [4, 3, 2, 2, 1, 1]
    assert sum(positions.tokens) == sum(LENGTHS)
    for mode, of_mode in losses.items():
        for i, (start, stop) in enumerate(zip(positions.edges[:-1], positions.edges[1:], strict=True)):
            expected = np.concatenate([loss[start:stop] for loss in of_mode]).mean()
            assert positions.losses[mode][i] == pytest.approx(expected, rel=1e-5)


def test_a_control_is_called_worse_only_if_it_is() -> None:
    worse, not_worse, far_worse = control_sentences(make_summary(*LENGTHS)).splitlines()
    assert worse.startswith("- Another document's memory is worse than the right memory by 0.20")
    assert "NOT shown to be worse" in not_worse
    assert far_worse.startswith("- Own memory, random keys is worse than the right memory by 0.4")


def test_the_table_has_a_line_for_each_mode_and_columns_of_one_width() -> None:
    lines = table(make_summary(*LENGTHS)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "off",
        "512 entries",
        "2,048 entries",
        "another document's memory",
        "own memory, values shuffled",
        "own memory, random keys",
    ]
    assert lines[3].endswith("| 4 of 4          |")


def test_one_document_has_no_intervals_and_no_verdict() -> None:
    text = markdown(make_summary(90, shuffled=0.1, size2048=0.3), "Title", "What.")
    assert "[-]" in text
    assert "nan" not in text
    assert "1 document, 90 tokens" in text
    assert "no intervals and no memory of another" in text
    assert "from one document nothing follows for others" in text


def test_a_report_begins_with_its_warning_and_ends_with_its_origin() -> None:
    text = markdown(make_summary(*LENGTHS), "Title", "What.", warning="not so", origin="Made here.")
    assert text.index("**Warning:** not so.") < text.index("| memory")
    assert text.endswith("\n\nMade here.\n")
    assert "Warning" not in markdown(make_summary(*LENGTHS), "Title", "What.")


def test_everything_goes_through_json() -> None:
    kept = json.loads(json.dumps(make_summary(*LENGTHS).to_dict(), allow_nan=False))
    assert kept["modes"]["512"]["change"]["interval"][0] < kept["modes"]["512"]["change"]["value"] < 0
    assert {name: control["verdict"] for name, control in kept["controls"].items()} == {
        "other": "worse",
        "shuffled": "not worse",
        "random keys": "worse",
    }
    assert kept["documents"][1]["name"] == "document 1"
    assert set(kept["documents"][1]["loss"]) == set(kept["modes"])


@pytest.mark.parametrize("lengths", [LENGTHS, (90,), (1,), (1, 1)])
@pytest.mark.parametrize("gains", [{}, {"size7": 0.1}])
def test_a_plot_is_drawn_of_any_evaluation(lengths: tuple[int, ...], gains: dict[str, float], tmp_path: Path) -> None:
    made = make_summary(*lengths, **gains)
    save_png(evaluation_charts(made.to_dict() | {"segment_length": 16}), tmp_path / "plot.png")
    off = summarise(make_losses(*lengths), names=["name"] * len(lengths), draws=20)
    save_png(evaluation_charts(off.to_dict() | {"segment_length": 16}), tmp_path / "off.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert "Controls" not in markdown(off, "Title", "What.")


def test_what_does_not_fit_together_is_refused() -> None:
    losses = make_losses(3, 4)
    with pytest.raises(ValueError, match=r"expected 'off' among the modes, got \['512'\]"):
        summarise({"512": losses["off"]}, names=["a", "b"])
    with pytest.raises(ValueError, match=r"expected names and bytes of 2 documents, got \(1, 1\)"):
        summarise(losses, names=["a"])
    with pytest.raises(ValueError, match=r"expected names and bytes of 2 documents, got \(2, 1\)"):
        summarise(losses, names=["a", "b"], num_bytes=[3])
