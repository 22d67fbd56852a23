"""A contestant: a process that does one thing whenever it is asked, and tells how long it took and how much memory.

It speaks JSON over its standard streams and uses nothing but Python (and PyTorch on a GPU), so that it also runs in the
environment of the original package.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Action = Callable[[], "Mapping[str, Any] | None"]


def serve(builders: Mapping[str, Callable[..., Action]]) -> None:
    """Build what the arguments name, say so, then do it once for each line that comes in."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    name, options = sys.argv[1], json.loads(sys.argv[2])
    action = builders[name](**options)
    print(json.dumps({"resident_bytes": status("VmRSS")}), file=answers)
    for _ in sys.stdin:
        forget_peak()
        before, began = status("VmRSS"), time.perf_counter()
        found = action() or {}
        seconds = time.perf_counter() - began
        memory = {"peak_bytes": status("VmHWM"), "resident_bytes": before}
        print(json.dumps({"seconds": seconds, **memory, **found}), file=answers)


def timed(action: Callable[[], object], device: str) -> tuple[float, dict[str, int]]:
    """How many seconds it takes until a device has done it, and on a GPU the most memory it took there meanwhile."""
    if device == "cpu":
        began = time.perf_counter()
        action()
        return time.perf_counter() - began, {}
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    action()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return seconds, {"peak_bytes": torch.cuda.max_memory_allocated(), "resident_bytes": before}


def status(field: str) -> int:
    """A size in bytes from the kernel's account of this process (Linux)."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> None:
    """Let the peak of resident memory (VmHWM) begin anew."""
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
