"""docs/performance.md and its plots, from the results of the measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.targets import GIB, Results, targets
from memorizing_transformers_pytorch.evaluation.provenance import origin

SEGMENT = 512
PARTS = ("products", "rest", "search", "attend", "add")
COLORS = dict(zip(PARTS, ("tab:gray", "silver", "tab:blue", "tab:orange", "tab:green"), strict=True))


def write_page(results: Results, path: Path, on_gpu: Results, notes: str) -> None:
    """Write the page and, beside it, the plots. notes: on the targets, by hand."""
    parts = [INTRODUCTION, targets(results, on_gpu), notes, *sections(results)]
    if on_gpu:
        parts += [ON_GPU, *(part.replace("## ", "### ", 1) for part in sections(on_gpu))]
    path.write_text("\n".join(parts), encoding="utf-8")
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    if "parts" in results:
        draw_parts(results["parts"]["found"], folder / "step.png")
    if "sweep" in results:
        draw_sweep(results["sweep"]["found"], folder / "recall.png")


def sections(results: Results) -> Iterator[str]:
    """What was measured, each with where it comes from."""
    for name, section in SECTIONS.items():
        if name in results:
            where = origin(results[name]).replace("; ", ", ")
            quick = " **The quick form: fewer rounds, smaller memories.**" if results[name]["quick"] else ""
            yield section(results[name]["found"])
            yield f"({where}.{quick})\n"


INTRODUCTION = """# Performance

What a memory costs in time and space, measured by

```sh
make bench            # an hour; `make bench QUICK=1` takes ten minutes
make bench-gpu        # the column of the GPU
```

Rivals run in processes of their own, all built first and then asked in turn, round after round; numbers are medians, in
brackets the range. Ratios are of medians within one run; the machine is named under each table. Beside this package
runs the original, memorizing-transformers-pytorch 0.4.1, in an environment of its own. "Trained" keys and queries are
those of a small model trained for the purpose (`benchmarks/vectors.py`), "random" ones are unit vectors.
"""

ON_GPU = """## On a GPU

The same there: model and memory on the GPU, searched exactly, memory counted as PyTorch allocates it. The original's
model runs on the GPU, its index on the CPU.
"""


def step_section(found: Results) -> str:
    lines = [
        "## A training step\n\nThe enwik8 model (width 512, depth 8, memory in layer 4, XL memory in 7 and 8, segments "
        f"of 512),\n{found['rows']} rows: forward, backward, Adam.\n"
    ]
    lines += ["| memory | seconds | against none | index |", "|---|---|---|---|"]
    none = found["0"]["seconds"]["median"]
    for name, each in found.items():
        if name != "rows":
            cells = [name, spread(each["seconds"]), f"{each['seconds']['median'] / none:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {each.get('index') or ''} |")
    return "\n".join(lines) + "\n"


def space_section(found: Results) -> str:
    lines = [
        "## The memory that a step takes\n\nThat step with 7,680 entries: what it takes at most beyond what lies there "
        "before it (weights,\noptimizer, memories), and the whole process. The allocator gives back at once what is "
        "let go, so\nnothing is counted that is not used.\n\nAn entry takes 4 D bytes in 16 bits and 8 D in float32 "
        "for each key/value head of width D, and 32 for its\norigin and age.\n"
    ]
    lines += ["| rows | | step, MiB | process, MiB |", "|---|---|---|---|"]
    for name, each in found.items():
        rows, kind = name.split()
        sizes = [f"{each[field]['median'] / 2**20:.0f}" for field in ("step_bytes", "peak_bytes")]
        lines.append(f"| {rows} | {kind} | {' | '.join(sizes)} |")
    return "\n".join(lines) + "\n"


def parts_section(found: Results) -> str:
    lines = ["## Where the time of a step goes\n", "![Where the time goes](performance/step.png)\n"]
    lines += ["| memory | " + " | ".join(PARTS) + " |", "|---" * (len(PARTS) + 1) + "|"]
    for name, parts in found.items():
        lines.append(f"| {name} | " + " | ".join(f"{parts[part]:.3f} s" for part in PARTS) + " |")
    return "\n".join(lines) + "\n"


def look_up_section(found: Results) -> str:
    lines = [
        "## The memory alone\n\nAdding a segment of 512 and searching with its 8 x 512 queries for 32 entries each, in "
        "seconds. Both packages\nhere copy what they find (`search`); a model of this package does not, and takes "
        "`retrieve` only. Recall is measured\nalike for all, with 256 of the queries against all keys. *Build* is what "
        "the first search takes: an index that must be\nbuilt anew, because it cannot forget or the keys have drifted, "
        "takes so long at most once for every quarter of the\nmemory that is written; *rebuilding* is that for one "
        "segment, at worst. *Product* is the matrix product of\nthe same queries and keys: the bound of exact search.\n"
    ]
    for name, racers in found.items():
        size, keys = name.split()
        header = "| index | add + search | add | search | retrieve | recall | build | rebuilding |"
        lines += [f"{int(size):,} {keys} keys:\n", header, "|---" * 8 + "|"]
        for racer, each in racers.items():
            times = [spread(each[name]) if name in each else "" for name in ("seconds", "add", "search", "retrieve")]
            build = each.get("build" if "build" in each else "fill", {"median": 0.0})["median"]
            bound = build * 4 * SEGMENT / int(size) if "build" in each and racer != "exact" else 0.0
            recall = f"{each['recall']['median']:.3f}" if "recall" in each else ""
            rest = [recall, f"{build:.2f}", f"{bound:.3f}"]
            lines.append(f"| {' | '.join([described(racer, each), *times, *rest])} |")
        lines.append("")
    return "\n".join(lines)


def described(name: str, each: Results) -> str:
    return f"auto: {each['index']}" if name == "auto" else name


def sweep_section(found: Results) -> str:
    return (
        "## Recall and time\n\n![Recall against time](performance/recall.png)\n\nSearches with the queries of a "
        "segment in trained keys; each point looks twice as far as the one before.\n"
        "A query for which the lists hold less than it wants is answered exactly, so that the lowest points are not "
        "the\nfastest.\n"
    )


def writing_section(found: Results) -> str:
    lines = ["## Writing\n\nTokens per second of `generate`, all rows together.\n"]
    lines += ["| rows | memory | tokens/s | against none |", "|---|---|---|---|"]
    for batch, racers in found.items():
        none = racers["0"]["tokens_per_second"]["median"]
        for size, each in racers.items():
            value = each["tokens_per_second"]
            speed = f"{value['median']:.1f} [{value['least']:.1f}, {value['most']:.1f}]"
            lines.append(f"| {batch} | {int(size):,} | {speed} | {value['median'] / none:.2f} |")
    return "\n".join(lines) + "\n"


def growth_section(found: Results) -> str:
    base = ", ".join(f"{name} {value:,}" for name, value in found["base"].items())
    lines = [f"## How the cost of a look-up grows\n\nExact search and adding, from {base}; one is changed at a time.\n"]
    lines += ["| in | exponent | seconds |", "|---|---|---|"]
    for name, each in found.items():
        if name != "base":
            seconds = ", ".join(
                f"{size:,}: {value:.3f}" for size, value in zip(each["sizes"], each["seconds"], strict=True)
            )
            lines.append(f"| {name} | {each['exponent']:.2f} | {seconds} |")
    return "\n".join(lines) + "\n"


def scale_section(found: Results) -> str:
    each = found["mapped"]
    fill, build, search, recall, peak = (
        each[name]["median"] for name in ("fill", "build", "search", "recall", "peak_bytes")
    )
    return (
        f"## {found['entries']:,} entries in one row\n\nMemory-mapped, width 64, {each['index']}:\n"
        f"filled in {fill:.0f} s, the index built in {build:.0f} s; then a segment is added and its 8 x 512 queries\n"
        f"are answered in {search:.3f} s with a recall of {recall:.3f}; at most {peak / GIB:.1f} GiB resident, mapped\n"
        "pages included.\n"
    )


SECTIONS = {
    "step": step_section,
    "space": space_section,
    "parts": parts_section,
    "look_up": look_up_section,
    "sweep": sweep_section,
    "writing": writing_section,
    "growth": growth_section,
    "scale": scale_section,
}


def spread(value: Mapping[str, float]) -> str:
    """Median and range in seconds, to three digits."""
    return f"{rounded(value['median'])} [{rounded(value['least'])}, {rounded(value['most'])}]"


def rounded(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.3g}"


# Plots


def draw_parts(found: Results, path: Path) -> None:
    figure = Figure(figsize=(7, 0.6 * len(found) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = [0.0] * len(found)
    names = [name if name != "0" else "no memory" for name in found]
    for part in PARTS:
        widths = [parts[part] for parts in found.values()]
        axes.barh(names, widths, left=left, label=part, color=COLORS[part])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a training step")
    axes.legend()
    figure.savefig(path, dpi=110)


def draw_sweep(found: Results, path: Path) -> None:
    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (size, curves) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for name, points in curves.items():
            seconds, recalls = [p["seconds"] for p in points], [p["recall"] for p in points]
            axes.plot(seconds, recalls, marker="o", markersize=3, label=name)
        axes.set(title=f"{int(size):,} entries", xscale="log", xlabel="seconds for 4,096 queries", ylabel="recall@32")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
