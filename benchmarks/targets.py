"""What was aimed at, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
NONE = "not measured"
GIB = 1 << 30


def targets(results: Results, on_gpu: Results) -> str:
    """Every target beside its result."""
    lines = ["## Targets\n", "| measure | target | on this CPU | target on a GPU | on a GPU |", "|---|---|---|---|---|"]
    for (measure, target, value), (_, _, other), there in zip(
        measured(results), measured(on_gpu), GPU_TARGETS, strict=True
    ):
        lines.append(f"| {measure} | {target} | {value or NONE} | {there} | {other or NONE} |")
    return "\n".join(lines) + "\n"


GPU_TARGETS = (
    "<= 1.10",
    "<= 1.3",
    "<= 2",
    ">= 20",
    ">= 20",
    "<= 0.5",
    "<= 0.5",
    *[">= 20"] * 8,
    ">= 0.8",
    ">= 0.5",
    "-",
)


def measured(results: Results) -> Iterator[tuple[str, str, str | None]]:
    """Each measure, its target on a CPU, and what was measured."""
    step = results.get("step", {}).get("found", {})
    yield "step, 8K full / no memory", "<= 1.15", best_ratio(step, ("8192", "8192 auto"), "0")
    yield "step, 65K full / no memory", "<= 1.6", best_ratio(step, ("65536", "65536 auto"), "0")
    yield "step, 262K full / no memory", "report; <= 3 approximate", best_ratio(step, ("262144", "262144 auto"), "0")
    yield "step, original / ours at 7,680 full", ">= 2", ratio(step, "original", "7680")
    yield "the same, ours in bfloat16", ">= 4", ratio(step, "original", "7680 bf16")
    space = results.get("space", {}).get("found", {})
    for rows in (2, 8):
        measure = f"memory of that step at most, {rows} rows, ours / original"
        yield measure, "<= 0.5", ratio(space, f"{rows} ours", f"{rows} original", "step_bytes")
    look_up = results.get("look_up", {}).get("found", {})
    for size in (8_192, 65_536, 262_144, 1_000_000):
        measure = f"add + search at {size:,} and equal recall, original / ours"
        yield f"{measure}, as their layers do", ">= 3", at_equal_recall(look_up, size, "retrieve")
        yield f"{measure}, with copies of what was found", ">= 3", at_equal_recall(look_up, size, "search")
    writing = results.get("writing", {}).get("found", {}).get("1", {})
    for size, target in (("65536", ">= 0.8"), ("1000000", ">= 0.5")):
        yield f"writing with {int(size):,} entries / none", target, ratio(writing, size, "0", "tokens_per_second")
    scale = results.get("scale", {}).get("found", {})
    big = scale.get("mapped")
    space = None
    if big is not None and scale["entries"] >= 10_000_000:
        space = f"{big['peak_bytes']['median'] / GIB:.1f} GiB, recall {big['recall']['median']:.3f}"
    yield "10M entries in a row", "< 12 GiB, recall@32 >= 0.95", space


def ratio(found: Results, one: str, other: str, field: str = "seconds") -> str | None:
    if one not in found or other not in found:
        return None
    return f"{found[one][field]['median'] / found[other][field]['median']:.2f}"


def best_ratio(found: Results, names: Sequence[str], other: str) -> str | None:
    known = [(float(value), name) for name in names if (value := ratio(found, name, other)) is not None]
    if not known:
        return None
    value, name = min(known)
    return f"{value:.2f} ({'auto: ' + found[name]['index'] if 'auto' in name else 'exact'})"


def at_equal_recall(look_up: Results, size: int, call: str) -> str | None:
    """Against the original's graph, searched as far as it takes to find as much as ours, or as far as was tried.

    call: how this package searches. The layers of a model `retrieve`; `search` copies keys and values, as the original
    always does.
    """
    found = look_up.get(f"{size} trained", {})
    graphs = [name for name in found if name.startswith("original")]
    if not graphs:
        return None

    def recall(name: str) -> float:
        return float(found[name]["recall"]["median"])

    def seconds(name: str) -> float:
        each = found[name]
        return float(each["add"]["median"] + each["search" if name in graphs else call]["median"])

    ours = min([name for name in ("exact", "auto") if name in found], key=seconds)
    enough = [name for name in graphs if recall(name) >= min(recall(ours), 0.95)]
    graph = min(enough, key=seconds) if enough else max(graphs, key=recall)
    times = seconds(graph) / seconds(ours)
    return f"{times:.1f} ({graph}: recall {recall(graph):.2f}; ours, {ours}: {recall(ours):.2f})"
