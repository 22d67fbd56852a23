"""What memorizing-transformers-pytorch 0.4.1 does in the measurements; run by `race` in an environment of its own."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent))
from memorizing_transformers_pytorch.knn_memory import KNNMemory
from serving import Action, serve

from memorizing_transformers_pytorch import MemorizingTransformer

SEGMENT, HEADS, DIM_HEAD, TOPK = 512, 8, 64, 32


def fill(memory: Any, rows: int, keys: torch.Tensor) -> None:
    for part in keys.split(SEGMENT):
        pairs = torch.stack((part, part.roll(1, 0)), dim=-2)
        memory.add(pairs.expand(rows, *pairs.shape))


def vectors_of(path: str | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    if path is None:
        random = torch.Generator().manual_seed(0)
        keys = normalize(torch.randn(count, DIM_HEAD, generator=random), dim=-1)
        return keys, normalize(torch.randn(HEADS, SEGMENT, DIM_HEAD, generator=random), dim=-1)
    saved = torch.load(path, mmap=True)
    return saved["keys"][len(saved["keys"]) - count :], saved["queries"]


def step(*, entries: int, rows: int, vectors: str | None = None) -> Action:
    """A training step on one segment, as in its train.py. At capacity it would wipe its index: it has room to spare."""
    torch.manual_seed(0)
    model = MemorizingTransformer(
        num_tokens=256, dim=512, depth=8, memorizing_layers=4, max_knn_memories=entries + 64 * SEGMENT,
        num_retrieved_memories=TOPK, xl_memory_layers=(7, 8), xl_max_memories=SEGMENT,
        knn_memories_directory=tempfile.mkdtemp(),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    tokens = torch.randint(256, (rows, SEGMENT))
    memories = model.create_knn_memories(batch_size=rows)
    fill(memories[0], rows, vectors_of(vectors, entries)[0])
    xl_memories = None

    def action() -> None:
        nonlocal xl_memories
        loss, xl_memories = model(tokens, memories, xl_memories=xl_memories, labels=tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return action


def look_up(*, entries: int, effort: int | None = None, vectors: str | None = None) -> Action:
    """Add a segment, then search with the queries of a segment. effort: efSearch of its graph, unless its own."""
    keys, queries = vectors_of(vectors, entries + SEGMENT)
    file = Path(tempfile.mkdtemp()) / "memory"
    memory = KNNMemory(DIM_HEAD, entries + 64 * SEGMENT, 1, memmap_filename=str(file), multiprocessing=False)
    began = time.perf_counter()
    fill(memory, 1, keys[:entries])
    filled = time.perf_counter() - began
    if effort is not None:
        memory.knns[0].index.hnsw.efSearch = effort
    new, queries = keys[entries:], queries.reshape(1, -1, DIM_HEAD)
    recall = recall_of(memory, keys[:entries], queries)

    def action() -> dict[str, Any]:
        began = time.perf_counter()
        fill(memory, 1, new)
        added = time.perf_counter()
        memory.search(queries, TOPK)
        searched = time.perf_counter()
        return {
            "seconds": searched - began,
            "add": added - began,
            "search": searched - added,
            "fill": filled,
            "recall": recall,
        }

    return action


def recall_of(memory: Any, keys: torch.Tensor, queries: torch.Tensor) -> float:
    found = memory.knns[0].search(queries[0].numpy(), TOPK)
    best = (queries[0] @ keys.T).topk(TOPK).indices.numpy()
    return float(np.mean([len(np.intersect1d(a, b)) / TOPK for a, b in zip(found, best, strict=True)]))


if __name__ == "__main__":
    serve({"step": step, "look_up": look_up})
