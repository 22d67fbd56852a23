"""What a memory on disk costs: python -m benchmarks.disk [--entries 100000 1000000 10000000]

Of each size, in a fresh folder: saving it whole; adding some entries and saving again; opening it in a fresh process,
memory-mapped and not, and looking something up; verifying; forgetting a document; compacting. Times are medians of
several rounds (one, where all is written); sizes are those of the files that a save leaves new. Sizes that the file of
results has already are measured anew.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList
from memorizing_transformers_pytorch.memory.disk.load import How, load

ROOT = Path(__file__).parent.parent
DIM, DOCUMENT, BLOCK = 64, 10_000, 100_000

OPENING = """
import json, resource, sys, time, torch
from memorizing_transformers_pytorch.memory import KNNMemoryList
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
folder, mmap = sys.argv[1], sys.argv[2] == "True"
before, began = resident(), time.perf_counter()
memories = KNNMemoryList.load(folder, mmap=mmap)
opened, held = time.perf_counter() - began, resident() - before
began = time.perf_counter()
memories[0].search(torch.randn(1, 1, 64), 32)
print(json.dumps({"seconds": opened, "mebibytes": held, "first search": time.perf_counter() - began}))
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    entries: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    added: tuple[int, ...] = (1_000, 10_000)
    rounds: int = 3
    folder: Path = ROOT / ".bench" / "disk"
    results: Path = ROOT / "docs" / "disk.json"


def filled(entries: int) -> KNNMemoryList:
    """One layer and row, float16, in documents of 10,000 tokens."""
    memories = KNNMemoryList([KNNMemory(DIM, 2 * entries, dtype=torch.float16)])
    while (first := memories[0].num_entries[0]) < entries:
        add(memories, min(BLOCK, entries - first))
    return memories


def add(memories: KNNMemoryList, count: int) -> None:
    first = memories[0].num_entries[0]
    places = torch.arange(first, first + count)
    origins = torch.stack((places // DOCUMENT, places % DOCUMENT, places % 1_000), dim=-1)[None]
    memories.add([torch.randn(1, count, 2, DIM, dtype=torch.float16)], origins=origins)


def timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def opened(folder: Path, *, mmap: bool) -> dict[str, float]:
    """In a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(folder), str(mmap)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def median_of(measured: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in measured) for name in measured[0]}


def measure(entries: int, options: Options) -> dict[str, Any]:
    folder = options.folder / str(entries)
    shutil.rmtree(folder, ignore_errors=True)
    memories = filled(entries)
    found: dict[str, Any] = {"save whole": timed(lambda: memories.save(folder))}
    found["bytes"] = _bytes(folder)
    for count in options.added:
        seconds, sizes = [], []
        for _ in range(options.rounds):
            before = set(folder.iterdir())
            add(memories, count)
            seconds.append(timed(lambda: memories.save(folder)))
            sizes.append(sum(path.stat().st_size for path in set(folder.iterdir()) - before))
        found[f"save {count:,} more"] = {"seconds": statistics.median(seconds), "bytes": statistics.median(sizes)}
    memories.save(folder, compact=True)
    for mmap in (True, False):
        name = "open mapped" if mmap else "open in RAM"
        found[name] = median_of([opened(folder, mmap=mmap) for _ in range(options.rounds)])
    found["verify"] = timed(lambda: load(folder.resolve(), How(mmap=True, verify=True)))
    found["forget a document"] = timed(lambda: memories.forget(3))
    found["save without it"] = timed(lambda: memories.save(folder))
    found["compact"] = timed(lambda: memories.save(folder, compact=True))
    memories.cleanup()
    shutil.rmtree(folder)
    return found


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main(options: Options) -> None:
    known = json.loads(options.results.read_text()) if options.results.is_file() else {"measured": {}}
    for entries in options.entries:
        known["measured"][str(entries)] = measure(entries, options)
        known.update(provenance(torch.device("cpu")))
        options.results.write_text(json.dumps(known, indent=1) + "\n")
        print(entries, known["measured"][str(entries)], flush=True)
    print(table(known))


def table(results: dict[str, Any]) -> str:
    """For docs/reliability.md."""
    sizes = list(results["measured"])
    lines = ["| | " + " | ".join(f"{int(size):,} entries" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for name in results["measured"][sizes[0]]:
        cells = [_cell(name, results["measured"][size][name]) for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n({origin(results)})"


def _cell(name: str, value: Any) -> str:
    if name == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    if not isinstance(value, dict):
        return f"{value:.2f} s"
    if "bytes" in value:
        return f"{value['seconds']:.3f} s, {value['bytes'] / 2**20:,.2f} MiB"
    return f"{value['seconds']:.2f} s, {value['mebibytes']:,.0f} MiB of RAM; first search {value['first search']:.2f} s"


if __name__ == "__main__":
    main(tyro.cli(Options))
