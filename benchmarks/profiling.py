"""Where the time of a step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from memorizing_transformers_pytorch import KNNMemory
from memorizing_transformers_pytorch.attention import ops

PARTS = ("search", "attend", "add")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def profiled(action: Callable[[], object]) -> dict[str, float]:
    """Seconds of searching, attending to what was found (both ways), adding, the model's products, the rest."""
    with named_parts(), profile(activities=[ProfilerActivity.CPU]) as found:
        began = time.perf_counter()
        action()
        seconds = time.perf_counter() - began
    parts = dict.fromkeys((*PARTS, "products"), 0.0)
    for event in found.events() or ():
        if event.name in PARTS:
            parts[event.name] += event.cpu_time_total / 1e6
        elif event.name in PRODUCTS and not any(parent.name in PARTS for parent in parents(event)):
            parts["products"] += event.cpu_time_total / 1e6
    return {**parts, "rest": seconds - sum(parts.values())}


def parents(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


@contextlib.contextmanager
def named_parts() -> Iterator[None]:
    """Inside, the profiler knows the parts of a step by name."""
    changed = []
    for owner, attribute, name in (
        (KNNMemory, "retrieve", "search"),
        (KNNMemory, "stage", "add"),
        (KNNMemory, "commit", "add"),
        (ops, "sums_of", "attend"),
        (ops, "products_with_values", "attend"),
    ):
        function = getattr(owner, attribute)

        def named(*arguments: Any, function: Any = function, name: str = name, **options: Any) -> Any:
            with record_function(name):
                return function(*arguments, **options)

        setattr(owner, attribute, named)
        changed.append(partial(setattr, owner, attribute, function))
    try:
        yield
    finally:
        for undo in changed:
            undo()
