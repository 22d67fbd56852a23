"""What memorizing-transformers-pytorch 0.4.1 does in the measurements; run by `race` in an environment of its own."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent))
from judging import recall, sampled
from memorizing_transformers_pytorch.knn_memory import KNNMemory
from serving import Action, forget_peak, serve, timed

from memorizing_transformers_pytorch import MemorizingTransformer

SEGMENT, HEADS, DIM_HEAD, TOPK = 512, 8, 64, 32
ROUNDS = 16


def fill(memory: Any, rows: int, keys: torch.Tensor) -> None:
    for part in keys.split(65_536):
        pairs = torch.stack((part, part.roll(1, 0)), dim=-2)
        memory.add(pairs.expand(rows, *pairs.shape))


def vectors_of(path: str | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    if path is None:
        random = torch.Generator().manual_seed(0)
        keys = normalize(torch.randn(count, DIM_HEAD, generator=random), dim=-1)
        return keys, normalize(torch.randn(HEADS, SEGMENT, DIM_HEAD, generator=random), dim=-1)
    saved = torch.load(path, mmap=True)
    return saved["keys"][len(saved["keys"]) - count :], saved["queries"]


def step(*, entries: int, rows: int, vectors: str | None = None, device: str = "cpu") -> Action:
    """A training step on one segment, as in its train.py. At capacity it would wipe its index: it has room for one more
    segment, and is filled anew before each step."""
    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory()
    model = MemorizingTransformer(
        num_tokens=256, dim=512, depth=8, memorizing_layers=4, max_knn_memories=entries + SEGMENT,
        num_retrieved_memories=TOPK, xl_memory_layers=(7, 8), xl_max_memories=SEGMENT,
        knn_memories_directory=folder.name,
    ).to(device)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    tokens = torch.randint(256, (rows, SEGMENT)).to(device)
    memories = model.create_knn_memories(batch_size=rows)
    keys, queries = vectors_of(vectors, entries)
    search, of_its_kind = memories[0].search, queries.to(device).expand(rows, *queries.shape)
    memories[0].search = lambda _, topk: search(of_its_kind, topk)
    xl_memories = None

    def once() -> None:
        nonlocal xl_memories
        loss, xl_memories = model(tokens, memories, xl_memories=xl_memories, labels=tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def action() -> dict[str, Any]:
        memories[0].clear()
        fill(memories[0], rows, keys)
        forget_peak()
        seconds, peak = timed(once, device)
        return {"seconds": seconds, **peak, "folder": folder.name}

    return action


def look_up(*, entries: int, efforts: list[int], vectors: str | None = None, device: str = "cpu") -> Action:
    """Add a segment, another one each round, then search with the queries of a segment, looking as far as each effort
    says: efSearch of its graph, which it leaves at 16."""
    keys, queries = vectors_of(vectors, entries + ROUNDS * SEGMENT)
    folder = tempfile.TemporaryDirectory()
    file, capacity = str(Path(folder.name) / "memory"), entries + ROUNDS * SEGMENT
    memory = KNNMemory(DIM_HEAD, capacity, 1, memmap_filename=file, multiprocessing=False)
    began = time.perf_counter()
    fill(memory, 1, keys[:entries])
    filled = time.perf_counter() - began
    some, queries = sampled(queries), queries.reshape(1, -1, DIM_HEAD).to(device)
    rounds = iter(range(entries, capacity, SEGMENT))

    def action() -> dict[str, Any]:
        first = next(rounds)
        new = keys[first : first + SEGMENT].to(device)
        added, _ = timed(lambda: fill(memory, 1, new), device)
        points = []
        for effort in efforts:
            memory.knns[0].index.hnsw.efSearch = effort
            searched, _ = timed(lambda: memory.search(queries, TOPK), device)
            found = scores_of(memory, some, keys)
            quality = recall(found, some, keys[: first + SEGMENT])
            points.append({"seconds": added + searched, "search": searched, "recall": quality})
        return {"seconds": points[0]["seconds"], "add": added, "fill": filled, "points": points, "folder": folder.name}

    return action


def scores_of(memory: Any, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The inner products (q, K) of queries (q, D) with the keys (N, D), in order, that are found for them."""
    places = torch.from_numpy(memory.knns[0].search(queries.numpy(), TOPK))
    scores = (keys[places.clamp_min(0)] @ queries.unsqueeze(-1)).squeeze(-1)
    return scores.masked_fill(places < 0, -torch.inf)


if __name__ == "__main__":
    serve({"step": step, "look_up": look_up})
