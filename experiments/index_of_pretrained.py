"""Lists learned by inner products, or also for the queries, against exact search: with keys of a pretrained model.

    python experiments/index_of_pretrained.py MODEL_FOLDER OUTPUT.json --text moby-dick.txt --vectors vectors.pt

Of every fourth layer with a memory, and one of its key/value heads: its keys of the first tokens of a text (without
positions), more like them with noise where more entries are wanted, and the queries of 512 tokens that follow. Half of
the queries choose the lists, the recall is that of the other half. Times are of searches with all queries, in turn,
medians of rounds; numbers of lists are what a search reads of those there are. --vectors: a file of
`benchmarks/vectors.py`, with keys and queries of this package's own model, trained a little.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from huggingface_cost import NOISE
from huggingface_perplexity import load
from torch import Tensor

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.huggingface import attach_memory
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.index.auto import number_of_lists
from memorizing_transformers_pytorch.memory.index.structure import Kind

READ, TOPK, ASKING = 8_192, 32, 512
LEARNED = {"by inner products": lambda kind, _, keys: kind.trained(keys), "for queries too": Kind.trained_for}


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    text: Path
    vectors: Path | None = None
    sizes: tuple[int, ...] = (8_192, 65_536)
    rounds: int = 5
    threads: int = 1


def of_model(options: Options) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A name, keys (N, D) and queries (Q, D) of some layers."""
    model, tokenizer = load(options.model)
    text = tokenizer(options.text.read_text()[:200_000], return_tensors="pt").input_ids
    memory = attach_memory(model, retrieve="tokens", max_memories=READ, positions="constant")
    memory.read(text[:, :READ], progress=False)
    asked: dict[int, Tensor] = {}
    look_up = KNNMemory.look_up

    def noted(held: KNNMemory, queries: Tensor, *others: Any, **named: Any) -> Any:
        asked[id(held)] = queries
        return look_up(held, queries, *others, **named)

    KNNMemory.look_up = noted  # type: ignore[method-assign]
    with torch.no_grad():
        model(text[:, READ : READ + ASKING])
    KNNMemory.look_up = look_up  # type: ignore[method-assign]
    for number, layer in list(memory.layers.items())[::4]:
        held = layer.memories[-1]
        queries = asked[id(held)][0]
        own = queries[: queries.shape[0] // held.num_kv_heads].flatten(0, 1)
        yield f"layer {number}", held.store.keys[0, 0].floats(torch.float32), own.float()


def of_file(path: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    found = torch.load(path)
    yield "own model", found["keys"].float(), found["queries"].float().flatten(0, 1)


def filled_up(keys: Tensor, size: int) -> Tensor:
    """So many keys: the last of these, or these and others like them, with noise."""
    if len(keys) >= size:
        return keys[-size:]
    more = keys[torch.arange(size - len(keys)) % len(keys)]
    noise = NOISE * more.norm(dim=-1, keepdim=True) * torch.randn_like(more) / more.shape[-1] ** 0.5
    return torch.cat((keys, more + noise))


def measured(keys: Tensor, queries: Tensor, rounds: int) -> dict[str, Any]:
    """What each way reads and finds, and the seconds of a search."""
    half, lists = len(queries) // 2, number_of_lists(len(keys))
    pairs = torch.stack((keys, keys), dim=-2)[None]
    memories, found = {"exact": KNNMemory(keys.shape[-1], len(keys))}, dict[str, Any](lists=lists)
    memories["exact"].add(pairs)
    for name, trained_for in LEARNED.items():
        memories[name] = KNNMemory(keys.shape[-1], len(keys), index=f"IVF{lists},SQfp16")
        memories[name].add(pairs)
        Kind.trained_for = trained_for  # type: ignore[assignment, method-assign]
        memories[name].retrieve(queries[None, :half], TOPK)
        training = memories[name].searcher._training  # type: ignore[attr-defined]
        found[name] = {
            "read": training.probes,
            "recall": memories[name].recall(queries[None, half:], TOPK, sample=half),
            "for queries": training.templates[0]._space is not None,
        }
    times: dict[str, list[float]] = {name: [] for name in memories}
    for _ in range(rounds):
        for name, memory in memories.items():
            start = time.perf_counter()
            memory.retrieve(queries[None], TOPK)
            times[name].append(time.perf_counter() - start)
    return found | {"seconds": {name: statistics.median(each) for name, each in times.items()}}


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sources = [*(of_file(options.vectors) if options.vectors else ()), *of_model(options)]
    results: dict[str, Any] = {}
    for name, keys, queries in sources:
        queries = queries[torch.randperm(len(queries))]
        for size in options.sizes:
            results[f"{name}, {size:,}"] = measured(filled_up(keys, size), queries, options.rounds)
    results |= provenance(torch.device("cpu"))
    options.output.write_text(json.dumps(results, indent=1))
    print(table(results))
    print(f"({origin(results)}; {options.rounds} rounds)")


def table(results: dict[str, Any]) -> str:
    lines = [
        "| keys | lists | " + " | ".join(LEARNED) + " | exact / by inner products / for queries, ms |",
        "|---" * 5 + "|",
    ]
    for name, found in results.items():
        if isinstance(found, dict) and "seconds" in found:
            ways = [f"{found[way]['read']} read, recall {found[way]['recall']:.3f}" for way in LEARNED]
            took = " / ".join(f"{1000 * found['seconds'][way]:.0f}" for way in ("exact", *LEARNED))
            lines.append(f"| {name} | {found['lists']} | {' | '.join(ways)} | {took} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
