"""The curves of a training run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memorizing_transformers_pytorch.evaluation.report import label, order
from memorizing_transformers_pytorch.training.metrics import Record
from memorizing_transformers_pytorch.utils.charts import Chart, Curve

_POINTS = 200  # of a curve


def training_charts(records: Sequence[Record], memory_since: int | None = None) -> list[Chart]:
    """Loss, speed, and per head what the memory does. memory_since: the step from which the memory was used, if any."""
    mark = (memory_since, "the memory is used from here on") if memory_since else None
    loss = [Curve("training", _means((r["step"], r.get("loss")) for r in records))]
    validations = [r for r in records if "validation" in r]
    for name in sorted({name for r in validations for name in r["validation"]}, key=order):
        points = ((r["step"], r["validation"].get(name)) for r in validations)
        loss.append(Curve(f"validation, {label(name)}", [(step, value) for step, value in points if value is not None]))
    speed, search = (
        [Curve(name.replace("_", " "), _means((r["step"], r.get(name)) for r in records))]
        for name in ("tokens_per_second", "searching")
    )
    return [
        Chart("Loss", "step", "nats per token", loss, mark=mark),
        Chart("Speed", "step", "tokens per second", speed, mark=mark),
        Chart("Time in search", "step", "share", search, mark=mark),
        Chart("Attention on the memory, by head", "step", "share", _by_head(records, "mass")),
        Chart("Gate, by head", "step", "share of the memory", _by_head(records, "gate")),
        Chart("Temperature, by head", "step", "factor of the scores", _by_head(records, "temperature")),
        Chart("Age of what is retrieved", "step", "tokens", _by_head(records, "age", ("10%", "median", "90%"))),
    ]


def _by_head(records: Sequence[Record], key: str, names: Sequence[str] = ()) -> list[Curve]:
    """For each layer, a curve of each number under a key: one number for each head, or for each of the names."""
    curves = []
    for layer in sorted({layer for r in records for layer in r.get("memory", ())}):
        points = [(r["step"], values) for r in records if (values := r.get("memory", {}).get(layer, {}).get(key))]
        for i in range(len(points[0][1]) if points else 0):
            name = names[i] if names else f"head {i}"
            curves.append(Curve(f"{layer}, {name}", _means((step, values[i]) for step, values in points)))
    return curves


def _means(points: Iterable[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """The points that have a value; of many, the means of neighbours."""
    known = [(step, value) for step, value in points if value is not None]
    size = max(len(known) // _POINTS, 1)
    pieces = [known[i : i + size] for i in range(0, len(known), size)]
    return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]
