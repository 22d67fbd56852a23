"""What is measured. Each measurement is a race whose results are kept as JSON; see `page` for how they are shown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.race import Contestant, Record, median, race, summary

K = 1_024
EFFORTS = [16, 64, 256, 1_024]  # of the original's graph; the first is its own
RESULT = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly to measure. original: the Python of its environment. vectors: of a trained model."""

    quick: bool
    original: str
    vectors: str
    folder: Path

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 9

    @property
    def sizes(self) -> list[int]:
        return [8 * K, 65_536] if self.quick else [8 * K, 65_536, 262_144, 1_000_000]


def step(setting: Setting) -> RESULT:
    """A training step of the enwik8 model by memory, and the original's."""
    rows = 2
    ours = {f"{size}": Contestant("ours.py", "step", {"entries": size, "rows": rows}) for size in (0, 7_680, 8 * K)}
    for size in [size for size in setting.sizes if 8 * K < size < 1_000_000]:
        options = {"entries": size, "rows": rows, "vectors": setting.vectors}
        ours[f"{size}"] = Contestant("ours.py", "step", options)
        ours[f"{size} auto"] = Contestant("ours.py", "step", {**options, "index": "auto"})
    ours["7680 bf16"] = Contestant("ours.py", "step", {"entries": 7_680, "rows": rows, "bf16": True})
    ours["original"] = Contestant("original.py", "step", {"entries": 7_680, "rows": rows}, setting.original)
    return {"rows": rows, **summaries(race(ours, setting.rounds), "seconds", "peak_bytes", "resident_bytes", "index")}


def parts(setting: Setting) -> RESULT:
    """Where the time of a step goes."""
    kinds = {f"{size}": {"entries": size} for size in (0, 8 * K)}
    for size in [size for size in setting.sizes if 8 * K < size < 1_000_000]:
        kinds[f"{size}"] = {"entries": size, "vectors": setting.vectors}
        kinds[f"{size} auto"] = {"entries": size, "vectors": setting.vectors, "index": "auto"}
    options = {name: {**kind, "rows": 2, "parts": True} for name, kind in kinds.items()}
    found = race({name: Contestant("ours.py", "step", each) for name, each in options.items()}, setting.rounds)
    return {
        name: {
            part: sorted(record["parts"].get(part, 0.0) for record in records)[len(records) // 2]
            for part in ("search", "attend", "add", "rest")
        }
        for name, records in found.items()
    }


def look_up(setting: Setting) -> RESULT:
    """Adding a segment and searching with its queries: by index, by kind of keys; and the original's graph."""
    found = {}
    for size, keys in itertools.product(setting.sizes, ("trained", "random")):
        vectors = setting.vectors if keys == "trained" else None
        options = {"entries": size, "vectors": vectors}
        racers = {
            name: Contestant("ours.py", "look_up", {**options, "index": name})
            for name in indices(size, keys == "trained")
        }
        efforts = EFFORTS if keys == "trained" else EFFORTS[:1]
        racers["original"] = Contestant("original.py", "look_up", {**options, "efforts": efforts}, setting.original)
        print(f" {size:,} {keys} keys", flush=True)
        raced = race(racers, setting.rounds)
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
        efforts = {"IVF": [1, 2, 4, 8, 16, 32, 64, 128], "HNSW": [32, 64, 128, 256, 512, 1_024]}
        racers = {}
        for name in indices(size, True)[2:]:
            kind = "HNSW" if name.startswith("HNSW") else "IVF"
            options = {"entries": size, "index": name, "efforts": efforts[kind], "vectors": setting.vectors}
            racers[name] = Contestant("ours.py", "sweep", options)
        racers["exact"] = Contestant("ours.py", "look_up", {"entries": size, "vectors": setting.vectors})
        raced = race(racers, 1 if setting.quick else 3)
        found[f"{size}"] = {
            name: [middle([record["points"][i] for record in records]) for i in range(len(records[0]["points"]))]
            for name, records in raced.items()
            if name != "exact"
        } | {"exact": [{"recall": 1.0, "seconds": median(raced["exact"], "search")}]}
    return found


def middle(points: Sequence[Record]) -> Record:
    """The one that took the median time."""
    return sorted(points, key=lambda point: float(point["seconds"]))[len(points) // 2]


def indices(size: int, trained: bool) -> list[str]:
    """Exact, the automatic choice, and for trained keys some structures of faiss."""
    if not trained or size < 65_536:
        return ["exact", "auto"]
    lists = 2 ** round(math.log2(2 * math.sqrt(size)))
    graph = ["HNSW15"] if size < 1_000_000 else []  # it is built anew too often for more
    return ["exact", "auto", f"IVF{lists},Flat", f"IVF{lists},SQ8", f"IVF{lists},PQ32", *graph]


def writing(setting: Setting) -> RESULT:
    """Tokens per second of `generate` by memory and batch."""
    found = {}
    for batch in (1, 8):
        sizes = [0, 65_536] if setting.quick else [0, 65_536, 1_000_000]
        racers = {}
        for size in sizes:
            # A million entries for each of 8 rows would be 5 GB.
            count = min(size, 131_072) if batch == 8 else size
            vectors = setting.vectors if size else None
            options = {"entries": count, "batch": batch, "vectors": vectors, "index": "auto"}
            racers[f"{count}"] = Contestant("ours.py", "write", options)
        raced = race(racers, setting.rounds)
        found[f"{batch}"] = summaries(raced, "tokens_per_second")
    return found


def growth(setting: Setting) -> RESULT:
    """How the cost of a look-up grows with entries, rows, heads and the length of the segment: fitted exponents."""
    base = {"entries": 16_384, "rows": 2, "heads": 4, "segment": 256}
    steps = (1, 2, 4) if setting.quick else (1, 2, 4, 8)
    found: RESULT = {"base": base}
    for name, start in base.items():
        sizes = [start * factor for factor in steps] if name != "heads" else [1, 2, 4, 8]
        racers = {f"{size}": Contestant("ours.py", "look_up", {**base, name: size}) for size in sizes}
        seconds = [median(records) for records in race(racers, setting.rounds).values()]
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
    options["vectors"] = setting.vectors
    raced = race({"mapped": Contestant("ours.py", "many", options)}, 1, warm_up=0)
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
    "parts": parts,
    "look_up": look_up,
    "sweep": sweep,
    "writing": writing,
    "growth": growth,
    "scale": scale,
}
