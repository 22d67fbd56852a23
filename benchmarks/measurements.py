"""What is measured. Each measurement is a race whose results are kept as JSON; see `page` for how they are shown."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.race import Contestant, Record, median, race, summary

K = 1_024
ROWS = 2  # of a training step
EFFORTS = [16, 64, 256, 1_024]  # of the original's graph; the first is its own
RESULT = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly to measure. original: the Python of its environment. vectors: of a trained model."""

    quick: bool
    original: str
    vectors: str
    folder: Path
    device: str = "cpu"
    largest: int = 1_000_000

    def race(
        self, racers: Mapping[str, Contestant], rounds: int | None = None, *, together: bool | None = None
    ) -> dict[str, list[Record]]:
        """All of them on the device, for so many rounds; beside a GPU they are built together unless said otherwise."""
        placed = {name: replace(each, options={**each.options, "device": self.device}) for name, each in racers.items()}
        together = self.device != "cpu" if together is None else together
        return race(placed, rounds or self.rounds, together=together)

    def ours(self, action: str, **options: Any) -> Contestant:
        """This package, doing so, with trained keys unless said otherwise."""
        return Contestant("ours.py", action, {"vectors": self.vectors, **options})

    def theirs(self, action: str, **options: Any) -> Contestant:
        """The original, doing so."""
        return Contestant("original.py", action, {"vectors": self.vectors, **options}, self.original)

    @functools.cached_property
    def has_bfloat16(self) -> bool:
        """Whether products in bfloat16 are fast enough here to be measured: without instructions for them a step of a
        second takes more than a minute."""
        return self.device != "cpu" or seconds_of_products(torch.bfloat16) < 4 * seconds_of_products(torch.float32)

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 9

    @property
    def sizes(self) -> list[int]:
        largest = min(self.largest, 65_536) if self.quick else self.largest
        return [size for size in (8 * K, 65_536, 262_144, 1_000_000) if size <= largest]


def seconds_of_products(dtype: torch.dtype) -> float:
    """For one of 512 x 512 numbers, the median of some."""
    numbers, taken = torch.randn(512, 512).to(dtype), []
    for _ in range(4):
        start = time.perf_counter()
        numbers @ numbers
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[1]  # the first warms up


def step(setting: Setting) -> RESULT:
    """A training step of the enwik8 model by memory, and the original's."""
    racers = {name: setting.ours("step", rows=ROWS, **kind) for name, kind in kinds_of_memory(setting).items()}
    racers["7680"] = setting.ours("step", rows=ROWS, entries=7_680)
    if setting.has_bfloat16:
        racers["0 bf16"] = setting.ours("step", rows=ROWS, entries=0, bf16=True)
        racers["7680 bf16"] = setting.ours("step", rows=ROWS, entries=7_680, bf16=True)
    racers["original"] = setting.theirs("step", rows=ROWS, entries=7_680)
    return {"rows": ROWS, **summaries(setting.race(racers), "seconds", "index")}


def kinds_of_memory(setting: Setting) -> dict[str, RESULT]:
    """Of a step: none, and each size with exact search and with what is chosen automatically."""
    kinds: dict[str, RESULT] = {"0": {"entries": 0}}
    for size in [size for size in setting.sizes if size < 1_000_000]:
        kinds[f"{size}"] = {"entries": size}
        if setting.device == "cpu":
            kinds[f"{size} auto"] = {"entries": size, "index": "auto"}
    return kinds


def space(setting: Setting) -> RESULT:
    """The memory that a step takes at most, beyond what lies there before it."""
    racers = {}
    for rows in (2, 8):
        racers[f"{rows} none"] = setting.ours("step", rows=rows, entries=0)
        racers[f"{rows} ours"] = setting.ours("step", rows=rows, entries=7_680)
        if setting.has_bfloat16:
            racers[f"{rows} bf16"] = setting.ours("step", rows=rows, entries=7_680, bf16=True)
        racers[f"{rows} original"] = setting.theirs("step", rows=rows, entries=7_680)
    raced = setting.race({name: replace(each, returns_memory=True) for name, each in racers.items()}, rounds=3)
    for record in [record for records in raced.values() for record in records]:
        record["step_bytes"] = record["peak_bytes"] - record["resident_bytes"]
    return summaries(raced, "step_bytes", "peak_bytes", "resident_bytes")


def parts(setting: Setting) -> RESULT:
    """Where the time of a step goes."""
    kinds = kinds_of_memory(setting)
    raced = setting.race({name: setting.ours("step", rows=ROWS, parts=True, **kind) for name, kind in kinds.items()})
    return {name: middle_parts([record["parts"] for record in records]) for name, records in raced.items()}


def middle_parts(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: sorted(record[part] for record in records)[len(records) // 2] for part in records[0]}


def look_up(setting: Setting) -> RESULT:
    """Adding a segment and searching with its queries: by index, by kind of keys; and the original's graph."""
    found = {}
    kinds = ("trained", "random") if setting.device == "cpu" else ("trained",)  # exact search knows no difference
    for size, keys in itertools.product(setting.sizes, kinds):
        options = {"entries": size} | ({} if keys == "trained" else {"vectors": None})
        names = ["exact"] if setting.device != "cpu" else indices(size) if keys == "trained" else ["exact", "auto"]
        racers = {name: setting.ours("look_up", index=name, **options) for name in names}
        racers["product"] = setting.ours("product", entries=size)
        efforts = EFFORTS if keys == "trained" else EFFORTS[:1]
        racers["original"] = setting.theirs("look_up", efforts=efforts, **options)
        print(f" {size:,} {keys} keys", flush=True)
        raced = setting.race(racers, together=False)  # how long building takes is told
        originals = raced.pop("original")
        for i, effort in enumerate(efforts):
            raced[f"original, efSearch {effort}"] = [{**record, **record["points"][i]} for record in originals]
        fields = ("seconds", "add", "search", "retrieve", "recall", "index", "fill", "build")
        found[f"{size} {keys}"] = summaries(raced, *fields)
    return found


def sweep(setting: Setting) -> RESULT:
    """Recall against time for every index, by how far it looks, with trained keys."""
    found = {}
    for size in [size for size in setting.sizes if size > 8 * K]:
        efforts = [2**i for i in range(8)]
        racers = {name: setting.ours("sweep", entries=size, index=name, efforts=efforts) for name in indices(size)[2:]}
        racers["exact"] = setting.ours("look_up", entries=size)
        raced = setting.race(racers, 1 if setting.quick else 3)
        found[f"{size}"] = {
            name: [middle([record["points"][i] for record in records]) for i in range(len(records[0]["points"]))]
            for name, records in raced.items()
            if name != "exact"
        } | {"exact": [{"recall": 1.0, "seconds": median(raced["exact"], "retrieve")}]}
    return found


def middle(points: Sequence[Record]) -> Record:
    """The one that took the median time."""
    return sorted(points, key=lambda point: float(point["seconds"]))[len(points) // 2]


def indices(size: int) -> list[str]:
    """Exact, the automatic choice, and for many entries inverted lists with other codes."""
    if size < 65_536:
        return ["exact", "auto"]
    lists = 2 ** round(math.log2(2 * math.sqrt(size)))
    return ["exact", "auto", f"IVF{lists},Flat", f"IVF{lists},SQ8"]


def writing(setting: Setting) -> RESULT:
    """Tokens per second of `generate` by memory and batch."""
    found = {}
    for batch in (1, 8):
        sizes = [0, *(size for size in setting.sizes if size in (65_536, 1_000_000))]
        # A million entries for each of 8 rows would be 5 GB.
        counts = [min(size, 131_072) if batch == 8 else size for size in sizes]
        racers = {f"{count}": setting.ours("write", entries=count, batch=batch, index="auto") for count in counts}
        found[f"{batch}"] = summaries(setting.race(racers), "tokens_per_second")
    return found


def growth(setting: Setting) -> RESULT:
    """How the cost of a look-up grows with entries, rows, heads and the length of the segment: fitted exponents."""
    base = {"entries": 16_384, "rows": 2, "heads": 4, "segment": 256}
    steps = (1, 2, 4) if setting.quick else (1, 2, 4, 8)
    found: RESULT = {"base": base}
    for name, start in base.items():
        sizes = [start * factor for factor in steps] if name != "heads" else [1, 2, 4, 8]
        racers = {f"{size}": setting.ours("look_up", **{**base, name: size, "vectors": None}) for size in sizes}
        seconds = [median(records, "add") + median(records, "retrieve") for records in setting.race(racers).values()]
        found[name] = {"sizes": sizes, "seconds": seconds, "exponent": exponent(sizes, seconds)}
    return found


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def scale(setting: Setting) -> RESULT:
    """Ten million entries in one row, memory-mapped."""
    entries = 200_000 if setting.quick else 10_000_000
    lists = 2 ** round(math.log2(math.sqrt(entries)))
    options = {"entries": entries, "index": f"IVF{lists},SQfp16", "directory": str(setting.folder / "mapped")}
    raced = race({"mapped": setting.ours("many", **options)}, 1, warm_up=0)
    return {"entries": entries, **summaries(raced, "fill", "build", "search", "recall", "peak_bytes", "index")}


def summaries(raced: Mapping[str, Sequence[Record]], *fields: str) -> RESULT:
    """For each contestant the median and range of each field, or what it said last."""
    found: RESULT = {}
    for name, records in raced.items():
        found[name] = {}
        for field in fields:
            if field in records[-1]:
                number = isinstance(records[-1][field], int | float)
                found[name][field] = summary(records, field) if number else records[-1][field]
    return found


MEASUREMENTS: dict[str, Callable[[Setting], RESULT]] = {
    "step": step,
    "space": space,
    "parts": parts,
    "look_up": look_up,
    "sweep": sweep,
    "writing": writing,
    "growth": growth,
    "scale": scale,
}
ON_GPU = ("step", "space", "look_up", "writing")
