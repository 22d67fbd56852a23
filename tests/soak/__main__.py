"""`python -m tests.soak --operations 1000000`: memories against plain lists, until so many operations or seconds."""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

import faiss
import torch

from tests.soak.machine import Machine

OPERATIONS_OF_ONE = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=3_600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    done: Counter[str] = Counter()
    began, seed, early = time.monotonic(), options.seed, None
    with tempfile.TemporaryDirectory() as folder:
        while sum(done.values()) < options.operations and time.monotonic() - began < options.seconds:
            machine = Machine(seed, Path(folder))
            try:
                done.update(machine.run(OPERATIONS_OF_ONE))
            except BaseException:
                print(f"seed {seed} ({machine!r})", flush=True)
                raise
            finally:
                machine.close()
            seed += 1
            if seed - options.seed == 200:
                early = _resident()
            if seed % 200 == 0:
                print(
                    f"{sum(done.values()):,} operations, {time.monotonic() - began:.0f} s, {_resident()} MiB",
                    flush=True,
                )
    print(f"{sum(done.values()):,} operations, no difference: {dict(sorted(done.items()))}")
    print(
        f"{seed - options.seed} memories, {time.monotonic() - began:.0f} s, {_resident()} MiB (early: {early} MiB), "
        f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB"
    )


def _resident() -> int:
    """MiB of RAM that this process uses."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


if __name__ == "__main__":
    main()
