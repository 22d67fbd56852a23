"""What this package does in the measurements; run by `race` in processes of its own."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent))
from judging import recall, sampled
from profiling import profiled
from serving import Action, serve, timed

from memorizing_transformers_pytorch import KNNMemory, MemorizingTransformer
from memorizing_transformers_pytorch.model.generation import stream

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
    device: str = "cpu",
) -> Action:
    """A training step on one segment: forward, backward, Adam; the memory full and read with queries of its kind."""
    torch.manual_seed(0)
    model = MemorizingTransformer(**ENWIK8, max_knn_memories=max(entries, 1), memory_index=index).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    tokens = torch.randint(256, (rows, SEGMENT)).to(device)
    memories = model.create_knn_memories(batch_size=rows) if entries else None
    if memories is not None:
        keys, queries = entries_of(vectors, entries)
        fill(memories[0], keys)
        look_up, of_its_kind = memories[0].look_up, queries.to(device).expand(rows, HEADS, SEGMENT, DIM_HEAD)
        memories[0].look_up = lambda _, *rest, **named: look_up(of_its_kind, *rest, **named)  # type: ignore[method-assign]
    xl_memories = None

    def once() -> None:
        nonlocal xl_memories
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss, xl_memories = model(tokens, memories, xl_memories, labels=tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def action() -> dict[str, Any] | None:
        if parts:
            return {"parts": profiled(once)}
        seconds, peak = timed(once, device)
        return {"seconds": seconds, **peak, "index": memories[0].index_in_use if memories else None}

    return action


def look_up(
    *,
    entries: int,
    rows: int = 1,
    heads: int = HEADS,
    segment: int = SEGMENT,
    index: str = "exact",
    vectors: str | None = None,
    directory: str | None = None,
    device: str = "cpu",
) -> Action:
    """Add a segment to a full memory, then search it with the queries of a segment: another one each round.

    seconds: of adding and of `search`, which like the original's copies keys and values. retrieve: of searching alone,
    as the layers of a model do. build: of the first search, with which an index is built.
    """
    keys, queries = entries_of(vectors, entries + ROUNDS * segment)
    memory = KNNMemory(DIM_HEAD, entries, rows, index=index, directory=directory, device=device)
    queries = queries.repeat(1, -(-segment // SEGMENT), 1)[:heads, :segment].to(device)
    queries = queries.expand(rows, *queries.shape)
    keys = keys.to(device)
    once = {
        "fill": timed(lambda: fill(memory, keys[:entries]), device)[0],
        "build": timed(lambda: memory.retrieve(queries, TOPK), device)[0],
    }
    segments = itertools.cycle(torch.split(keys[entries:], segment))

    def action() -> dict[str, Any]:
        new = next(segments)
        add, _ = timed(lambda: fill(memory, new), device)
        search, _ = timed(lambda: memory.search(queries, TOPK), device)
        retrieve, _ = timed(lambda: memory.retrieve(queries, TOPK), device)
        some = sampled(queries[:1])
        found = 1.0 if index == "exact" else recall(found_by(memory, some), some, memory.store.keys[0, 0].floats())
        times = {"seconds": add + search, "add": add, "search": search, "retrieve": retrieve, **once}
        return {**times, "recall": found, "index": memory.index_in_use}

    return action


def found_by(memory: KNNMemory, queries: Tensor) -> Tensor:
    """The scores (q, K) of what the first row finds for queries (q, D)."""
    with memory.at_batch_indices([0]):
        return memory.retrieve(queries[None], TOPK).scores[0]


def write(
    *,
    entries: int,
    batch: int,
    index: str = "exact",
    tokens: int = 64,
    vectors: str | None = None,
    device: str = "cpu",
) -> Action:
    """Tokens per second of writing with a full memory."""
    torch.manual_seed(0)
    model = MemorizingTransformer(**ENWIK8, max_knn_memories=max(entries, 1), memory_index=index).eval().to(device)
    memories = model.create_knn_memories(batch_size=batch) if entries else None
    if memories is not None:
        keys, queries = entries_of(vectors, entries)
        fill(memories[0], keys)
        look_up, of_its_kind = memories[0].look_up, itertools.cycle(torch.split(queries.to(device), 8, dim=1))

        def search(asked: Tensor, *rest: Any, **named: Any) -> Any:
            """With other queries of the kind each time."""
            return look_up(next(of_its_kind)[:, : asked.shape[2]].expand(asked.shape), *rest, **named)

        memories[0].look_up = search  # type: ignore[method-assign]
    prompts = torch.randint(256, (batch, 8)).tolist()

    def action() -> dict[str, Any]:
        began = time.perf_counter()
        written = sum(
            len(column)
            for column in stream(model, prompts, memories, max_new_tokens=tokens, segment_length=SEGMENT, temperature=0)
        )
        return {"tokens_per_second": written / (time.perf_counter() - began)}

    return action


def product(*, entries: int, device: str = "cpu", vectors: str | None = None) -> Action:
    """The inner products of a segment's queries with all keys: what exact search cannot do without."""
    keys, queries = torch.randn(entries, DIM_HEAD, device=device), torch.randn(HEADS * SEGMENT, DIM_HEAD, device=device)
    products = torch.empty(HEADS * SEGMENT, min(entries, 8_192), device=device)

    def once() -> None:
        for some in torch.split(keys, products.shape[1]):
            torch.mm(queries, some.T, out=products[:, : len(some)])

    return lambda: {"seconds": timed(once, device)[0]}


def sweep(
    *,
    entries: int,
    index: str,
    efforts: list[int],
    vectors: str | None = None,
    device: str = "cpu",
) -> Action:
    """Time and recall of a search by how many lists it probes."""
    keys, queries = entries_of(vectors, entries)
    memory = KNNMemory(DIM_HEAD, entries, index=index)
    fill(memory, keys)
    memory.retrieve(queries[None], TOPK)
    (row,) = memory.searcher._rows.values()  # type: ignore[attr-defined]

    def action() -> dict[str, Any]:
        points = []
        for effort in efforts:
            row.training.probes = effort
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
    serve({"product": product, "step": step, "look_up": look_up, "sweep": sweep, "write": write, "many": many})
