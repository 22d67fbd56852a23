"""The log of a run: a line of JSON for each step and validation, TensorBoard, a progress bar; and its curves."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from memorizing_transformers_pytorch.evaluation.report import label, order
from memorizing_transformers_pytorch.training.trainer import Step
from memorizing_transformers_pytorch.utils.charts import Chart, Curve
from memorizing_transformers_pytorch.utils.durable import replacing
from memorizing_transformers_pytorch.utils.plain_json import parse_object
from memorizing_transformers_pytorch.utils.progress import bar as progress_bar

_POINTS = 200  # of a curve
Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """The records of a run, without a last line that was cut off (by a kill, a full disk).

    Raises ValueError for any other line that is not a record with a step.
    """
    if not path.is_file():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    return [_record(line, f"{str(path)!r}, line {number:,}") for number, line in enumerate(whole, start=1)]


def _record(line: bytes, where: str) -> Record:
    record = parse_object(line, where)
    if not isinstance(record.get("step"), int):
        raise ValueError(f"expected a step in {where}, got {record.get('step')!r}")
    return record


def check_tensorboard_is_there() -> None:
    """Raises ValueError, with the remedy, if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard is not installed: pip install 'memorizing_transformers_pytorch[tensorboard]'")


class Metrics(AbstractContextManager["Metrics"]):
    """The metrics of a run from a step on; records of later steps, from an interrupted run, are removed.

    path: of the JSON lines. tensorboard: a folder for TensorBoard, or None.
    """

    def __init__(self, path: Path, *, step: int, tensorboard: Path | None = None) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        with replacing(path) as aside:
            aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._writer: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def note(self, record: Mapping[str, Any]) -> None:
        """Write a record, which has at least a "step". Infinite numbers and NaN become null."""
        self._file.write(json.dumps(_finite(record)) + "\n")
        if self._writer is not None:
            for name, value in _scalars(record):
                self._writer.add_scalar(name, value, record["step"])

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record, by a name such as memory/layer 2/mass/0."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from _scalars({str(i): item for i, item in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}{name}", float(value)


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """Steps done and left (with the time they will take), loss, speed, and what the memory holds and costs.

    bytes_per_token: of the training text.
    """

    def __init__(self, *, step: int, steps: int, bytes_per_token: float, disable: bool) -> None:
        self._bar = progress_bar(initial=step, total=steps, unit=" steps", disable=disable)
        self._nats_to_bits_per_byte = 1 / math.log(2) / bytes_per_token

    def record(self, step: Step, previous_tokens: int) -> Record:
        """The step as a record, with loss in bits per byte and speed."""
        tokens = step.tokens - previous_tokens
        return {
            "step": step.number,
            "loss": step.loss,
            "bits_per_byte": None if step.loss is None else step.loss * self._nats_to_bits_per_byte,
            "tokens": step.tokens,
            "tokens_per_second": tokens / step.seconds,
            "learning_rate": step.learning_rate,
            "grad_norm": step.grad_norm,
            "entries": step.entries,
            "searching": step.searching / step.seconds,
        }

    def show(self, record: Record, smoothed_loss: float | None, capacity: int) -> None:
        """The running mean of the loss, and the rest as it was in this step. capacity: entries that a row can keep."""
        bits = math.nan if smoothed_loss is None else smoothed_loss * self._nats_to_bits_per_byte
        shown = {
            "loss": f"{math.nan if smoothed_loss is None else smoothed_loss:.3f}",
            "bits/byte": f"{bits:.3f}",
            "tokens/s": f"{record['tokens_per_second']:.0f}",
            "memory": f"{record['entries'] / capacity:.0%}",
            "searching": f"{record['searching']:.0%}",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


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
