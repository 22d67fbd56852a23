"""What compact keys and values cost: bytes, the entries that are found, and perplexity, by how a memory keeps them.

    python experiments/compact_memory.py OUTPUT.json --model MODEL_FOLDER --text moby-dick.txt --run runs/small

Of a pretrained model (MODEL_FOLDER as for huggingface_perplexity.py): the later halves of passages of 4,096 tokens,
after their first halves were read into its memory. Of a run of this package: its held-out documents, with the memory it
was trained with. Recall is the share of the best 32 entries of float32 that are among the best 32 as they are kept, for
the same queries, those of the model with float32, wherever more than 128 entries are remembered. What OUTPUT.json has
already is not measured again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from huggingface_perplexity import HALF, after, load, starts
from torch import Tensor

from memorizing_transformers_pytorch.cli.evaluate import read_texts
from memorizing_transformers_pytorch.cli.options.evaluate import Evaluate
from memorizing_transformers_pytorch.evaluation.evaluate import evaluate, mean_loss
from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.huggingface import attach_memory
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.index.auto import make_index
from memorizing_transformers_pytorch.memory.index.exact import Best, ExactIndex, Ring
from memorizing_transformers_pytorch.training.run import load_run

BEST, LEAST = 32, 128  # entries that are compared, of more than so many


@dataclass(frozen=True)
class Way:
    """How keys and values are kept, and how they are searched."""

    dtype: str
    index: str = "exact"

    @property
    def name(self) -> str:
        return self.dtype if self.index == "exact" else f"{self.dtype}, searched by {self.index}"

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


WAYS = (*map(Way, ("float32", "bfloat16", "float16", "int8")), Way("float32", "IVF32,SQ8"))


@dataclass(frozen=True)
class Options:
    output: tyro.conf.Positional[Path]
    model: Path | None = None
    """Of transformers."""
    text: Path | None = None
    """That it reads."""
    passages: int = 3
    run: Path | None = None
    """Of this package."""
    documents: int = 24
    """Of the run, drawn at random among those of 2,048 tokens or more."""
    max_tokens: int = 8_192
    """Of each document."""
    compared: int = 6
    """Documents with which recall is measured."""


class Comparing(ExactIndex):
    """Searches float32 keys exactly, and notes which of the best entries each way would find too."""

    def __init__(self, dim: int, shares: dict[str, list[float]]) -> None:
        self._shares = shares
        self._others = {way: make_index(way.index, dim) for way in WAYS}

    def search(self, ring: Ring, queries: Tensor, topk: int) -> Best:
        best = super().search(ring, queries, max(topk, BEST))
        if ring.keys.shape[1] > LEAST:
            for way, index in self._others.items():
                kept = ring._replace(keys=Vectors.of(ring.keys.floats(), way.torch_dtype))
                found = index.search(kept, queries, BEST)
                share = (found.places[..., None] == best.places[..., None, :BEST]).any(dim=-1).float().mean()
                self._shares.setdefault(way.name, []).append(float(share))
        return Best(best.scores[..., :topk], best.places[..., :topk])


def bytes_of(memory: KNNMemory, way: Way) -> dict[str, int]:
    """Per entry of a layer: of keys and values, of all that the store keeps, and of the codes that an index adds."""
    sizes = memory.store.sizes._replace(dtype=way.torch_dtype)
    pairs = 2 * sizes.kv_heads * (sizes.dim * way.torch_dtype.itemsize + (4 if way.dtype == "int8" else 0))
    codes = 0 if way.index == "exact" else sizes.kv_heads * (sizes.dim + 8)  # and the number of the entry
    return {"bytes of keys and values": pairs, "bytes": sizes.bytes_per_entry, "bytes of the index": codes}


def pretrained(options: Options) -> dict[str, Any]:
    """Bytes, recall and losses of passages, by way."""
    assert options.model is not None
    assert options.text is not None
    model, tokenizer = load(options.model)
    text = tokenizer(options.text.read_text(), return_tensors="pt").input_ids[0]
    places, shares, found = starts(len(text), options.passages, HALF), {}, {}
    for way in WAYS:
        memory = attach_memory(
            model, retrieve="tokens", topk=BEST, max_memories=131_072, dtype=way.torch_dtype, index="exact"
        )
        parts = [part for layer in memory.layers.values() for part in layer.memories]
        for part in parts:  # the recent part too, which is exact unless told
            part.searcher = make_index(way.index, part.dim) if way != WAYS[0] else Comparing(part.dim, shares)
        losses = [after(memory, text[place - HALF : place], text[place : place + HALF]) for place in places]
        found[way.name] = {**bytes_of(parts[0], way), "losses": losses, "layers": list(memory.layers)}
        print(way.name, found[way.name], flush=True)
        memory.detach()
    return {name: {**each, "recall": float(np.mean(shares[name]))} for name, each in found.items()}


def trained(options: Options) -> dict[str, Any]:
    """The same of the held-out documents of a run."""
    assert options.run is not None
    run = load_run(options.run)
    choice = Evaluate(run=options.run, documents=options.documents, max_tokens=options.max_tokens, min_tokens=HALF)
    texts, model, config = read_texts(choice, run).tokens, run.model, run.model.config
    length, size, found = run.config.training.segment_length, config.max_knn_memories, {}
    shares = compared(model, [text[: options.max_tokens] for text in texts[: options.compared]], length)
    for way in WAYS:
        model.config = dataclasses.replace(config, memory_dtype=way.dtype, memory_index=way.index)
        sizes = [0, size] if way == WAYS[0] else [size]
        read = evaluate(model, texts, segment_length=length, memory_sizes=sizes, max_tokens=options.max_tokens)
        if "off" in read:
            found["no memory"] = {"losses": [mean_loss(read["off"])]}
        with model.knn_memories_context(batch_size=1) as memories:
            of_each = bytes_of(memories[0], way)
        found[way.name] = {
            **of_each,
            "losses": [mean_loss(read[str(size)])],
            "recall": float(np.mean(shares[way.name])),
        }
        print(way.name, found[way.name], flush=True)
    return found


@torch.no_grad()
def compared(model: Any, texts: Sequence[np.ndarray], length: int) -> dict[str, list[float]]:
    """Recall by way, while these documents are read with a float32 memory."""
    shares: dict[str, list[float]] = {}
    model.config = dataclasses.replace(model.config, memory_dtype="float32")
    for text in texts:
        state = None
        with model.knn_memories_context(batch_size=1) as memories:
            for memory in memories:
                memory.searcher = Comparing(memory.dim, shares)
            for segment in torch.split(torch.from_numpy(text.astype(np.int64)), length):
                result = model(segment[None], memories, state)
                state = result[1] if model.carries_state else None
    return shares


def main(options: Options) -> None:
    results = json.loads(options.output.read_text()) if options.output.is_file() else {}
    measures = {"pretrained": (pretrained, options.model), "trained": (trained, options.run)}
    for name, (measure, given) in measures.items():
        if given is not None and name not in results:
            results[name] = {"ways": measure(options), "of": given.name, **provenance(torch.device("cpu"))}
            options.output.write_text(json.dumps(results, indent=1))
    for name, found in results.items():
        print(f"\n{name} ({found['of']}; {origin(found)})\n\n{table(found['ways'])}")


def table(ways: dict[str, Any]) -> str:
    """Bytes per entry, recall, perplexity, and its change against float32."""
    lines = ["| kept as | bytes of keys and values | all bytes | recall@32 | perplexity | change |", "|---" * 6 + "|"]
    exact = float(np.mean(ways["float32"]["losses"]))
    for name, way in ways.items():
        loss = float(np.mean(way["losses"]))
        cells = ["", "", ""]
        if "bytes" in way:
            index = f" + {way['bytes of the index']}" if way["bytes of the index"] else ""
            cells = [f"{way['bytes of keys and values']}{index}", f"{way['bytes']}{index}", f"{way['recall']:.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {math.exp(loss):.3f} | {math.expm1(loss - exact):+.3%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
