"""What this package does in the measurements; run by `race` in processes of its own."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).parent))
from judging import recall, sampled
from serving import Action, serve

from memorizing_transformers_pytorch import KNNMemory, MemorizingTransformer
from memorizing_transformers_pytorch.generation import stream
from memorizing_transformers_pytorch.nn import retrieval

SEGMENT, HEADS, DIM_HEAD, TOPK = 512, 8, 64, 32
ROUNDS = 16  # for as many there are segments that were not added before
ENWIK8: dict[str, Any] = {
    "num_tokens": 256,
    "dim": 512,
    "depth": 8,
    "heads": HEADS,
    "dim_head": DIM_HEAD,
    "memorizing_layers": 4,
    "xl_memory_layers": (7, 8),
    "xl_max_memories": SEGMENT,
    "num_retrieved_memories": TOPK,
}


def entries_of(vectors: str | None, count: int) -> tuple[Tensor, Tensor]:
    """Keys (count, D) and queries (H, T, D): those of a trained model from a file, or random unit vectors."""
    if vectors is None:
        random = torch.Generator().manual_seed(0)
        keys = normalize(torch.randn(count, DIM_HEAD, generator=random), dim=-1)
        return keys, normalize(torch.randn(HEADS, SEGMENT, DIM_HEAD, generator=random), dim=-1)
    saved = torch.load(vectors, mmap=True)
    keys = saved["keys"]
    if count > len(keys):
        raise ValueError(f"expected {count:,} keys in {vectors}, got {len(keys):,}")
    return keys[len(keys) - count :], saved["queries"]


def fill(memory: KNNMemory, keys: Tensor, block: int = 65_536) -> None:
    """Every row gets all the keys (N, D); the values are the keys of other entries."""
    for part in torch.split(keys, block):
        pairs = torch.stack((part, part.roll(1, 0)), dim=-2)
        memory.add(pairs.expand(memory.num_indices, *pairs.shape))


def step(
    *,
    entries: int,
    rows: int,
    index: str = "exact",
    bf16: bool = False,
    vectors: str | None = None,
    parts: bool = False,
) -> Action:
    """A training step on one segment: forward, backward, Adam; the memory full and read with queries of its kind."""
    torch.manual_seed(0)
    model = MemorizingTransformer(**ENWIK8, max_knn_memories=max(entries, 1), memory_index=index)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    tokens = torch.randint(256, (rows, SEGMENT))
    memories = model.create_knn_memories(batch_size=rows) if entries else None
    if memories is not None:
        keys, queries = entries_of(vectors, entries)
        fill(memories[0], keys)
        look_up, of_its_kind = memories[0].look_up, queries.expand(rows, HEADS, SEGMENT, DIM_HEAD)
        memories[0].look_up = lambda _, *rest: look_up(of_its_kind, *rest)  # type: ignore[method-assign]
    xl_memories = None

    def once() -> None:
        nonlocal xl_memories
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, xl_memories = model(tokens, memories, xl_memories, labels=tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def action() -> dict[str, Any] | None:
        if not parts:
            once()
            return {"index": memories[0].index_in_use if memories else None}
        return {"parts": profiled(once)}

    return action


def profiled(action: Action) -> dict[str, float]:
    """Seconds of searching, attending to what was found (both ways) and adding, and of all."""
    with named_parts(), profile(activities=[ProfilerActivity.CPU]) as found:
        began = time.perf_counter()
        action()
        seconds = time.perf_counter() - began
    names = ("search", "attend", "add")
    parts = {event.key: event.cpu_time_total / 1e6 for event in found.key_averages() if event.key in names}
    return {**parts, "rest": seconds - sum(parts.values())}


@contextlib.contextmanager
def named_parts() -> Iterator[None]:
    """Inside, the profiler knows the parts of a step by name."""
    changed = []
    for owner, attribute, name in (
        (KNNMemory, "retrieve", "search"),
        (KNNMemory, "stage", "add"),
        (KNNMemory, "commit", "add"),
        (retrieval, "weighted_sums", "attend"),
        (retrieval, "sampled_inner_products", "attend"),
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


def look_up(
    *,
    entries: int,
    rows: int = 1,
    heads: int = HEADS,
    segment: int = SEGMENT,
    index: str = "exact",
    vectors: str | None = None,
    directory: str | None = None,
) -> Action:
    """Add a segment to a full memory, then search it with the queries of a segment: another one each round.

    seconds: of adding and of `search`, which like the original's copies keys and values. retrieve: of searching alone,
    as the layers of a model do. build: of the first search, with which an index is built.
    """
    keys, queries = entries_of(vectors, entries + ROUNDS * segment)
    memory = KNNMemory(DIM_HEAD, entries, rows, index=index, directory=directory)
    began = time.perf_counter()
    fill(memory, keys[:entries])
    queries = queries.repeat(1, -(-segment // SEGMENT), 1)[:heads, :segment]
    queries = queries.expand(rows, *queries.shape)
    filled = time.perf_counter()
    memory.retrieve(queries, TOPK)
    built = time.perf_counter()
    once = {"fill": filled - began, "build": built - filled}
    segments = itertools.cycle(torch.split(keys[entries:], segment))

    def action() -> dict[str, Any]:
        new = next(segments)
        began = time.perf_counter()
        fill(memory, new)
        added = time.perf_counter()
        memory.search(queries, TOPK)
        searched = time.perf_counter()
        memory.retrieve(queries, TOPK)
        retrieved = time.perf_counter()
        times = {"add": added - began, "search": searched - added, "retrieve": retrieved - searched, **once}
        some = sampled(queries[:1])
        found = 1.0 if index == "exact" else recall(found_by(memory, some), some, memory.store.keys[0, 0])
        return {**times, "seconds": searched - began, "recall": found, "index": memory.index_in_use}

    return action


def found_by(memory: KNNMemory, queries: Tensor) -> Tensor:
    """The scores (q, K) of what the first row finds for queries (q, D)."""
    with memory.at_batch_indices([0]):
        return memory.retrieve(queries[None], TOPK).scores[0]


def write(*, entries: int, batch: int, index: str = "exact", tokens: int = 64, vectors: str | None = None) -> Action:
    """Tokens per second of writing with a full memory."""
    torch.manual_seed(0)
    model = MemorizingTransformer(**ENWIK8, max_knn_memories=max(entries, 1), memory_index=index).eval()
    memories = model.create_knn_memories(batch_size=batch) if entries else None
    if memories is not None:
        fill(memories[0], entries_of(vectors, entries)[0])
    prompts = torch.randint(256, (batch, 8)).tolist()

    def action() -> dict[str, Any]:
        began = time.perf_counter()
        written = sum(
            len(column)
            for column in stream(model, prompts, memories, max_new_tokens=tokens, segment_length=SEGMENT, temperature=0)
        )
        return {"tokens_per_second": written / (time.perf_counter() - began)}

    return action


def sweep(*, entries: int, index: str, efforts: list[int], vectors: str | None = None) -> Action:
    """Time and recall of a search by how far it looks (lists that are probed, nodes that are visited)."""
    keys, queries = entries_of(vectors, entries)
    memory = KNNMemory(DIM_HEAD, entries, index=index)
    fill(memory, keys)
    memory.retrieve(queries[None], TOPK)
    (row,) = memory.searcher._rows.values()  # type: ignore[attr-defined]

    def action() -> dict[str, Any]:
        points = []
        for effort in efforts:
            row.training.effort = effort
            began = time.perf_counter()
            memory.retrieve(queries[None], TOPK)
            seconds = time.perf_counter() - began
            points.append({"effort": effort, "seconds": seconds, "recall": memory.recall(queries[None], TOPK, 64)})
        return {"points": points}

    return action


def many(*, entries: int, index: str, directory: str, vectors: str) -> Action:
    """More entries than a model has written here: its keys again and again, each time with other noise."""
    saved = torch.load(vectors, mmap=True)
    queries = saved["queries"][None]
    memory = KNNMemory(DIM_HEAD, entries, index=index, directory=directory)
    random = torch.Generator().manual_seed(0)

    def action() -> dict[str, Any]:
        began = time.perf_counter()
        while memory.num_entries[0] < entries:
            for keys in torch.split(saved["keys"], 65_536):
                noise = torch.randn(keys.shape, generator=random) / DIM_HEAD**0.5
                some = normalize(keys + 0.3 * noise, dim=-1)[: entries - memory.num_entries[0]]
                if len(some):
                    fill(memory, some)
        filled = time.perf_counter()
        memory.retrieve(queries, TOPK)
        built = time.perf_counter()
        times = []
        for part in torch.split(saved["keys"], SEGMENT)[:9]:
            fill(memory, part)
            at = time.perf_counter()
            memory.retrieve(queries, TOPK)
            times.append(time.perf_counter() - at)
        recall = memory.recall(queries, TOPK, sample=32)
        seconds = {"fill": filled - began, "build": built - filled, "search": sorted(times)[len(times) // 2]}
        memory.cleanup()
        return {**seconds, "recall": recall, "index": memory.index_in_use}

    return action


if __name__ == "__main__":
    serve({"step": step, "look_up": look_up, "sweep": sweep, "write": write, "many": many})
