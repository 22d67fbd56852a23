"""What a memory costs a pretrained model: tokens a second beside the bare model, and beside all of the text as context.

    python experiments/huggingface_cost.py MODEL_FOLDER OUTPUT.json --text moby-dick.txt

Of each size, in turn and several times: reading a chunk of 512 tokens and writing a token after it, by the bare model,
with a memory of so many entries in each layer, and with a cache of so many tokens in every layer. The entries are those
of 8,192 tokens, repeated with noise, so that they lie as real ones do; searched with index="auto". The cache holds
random numbers. Told are medians, and how much keys and values take.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from huggingface_perplexity import load
from torch import Tensor
from transformers import DynamicCache

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory
from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.store import StagedEntries

CHUNK, SEED_TOKENS, NOISE = 512, 8_192, 0.05


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    text: Path
    sizes: tuple[int, ...] = (4_096, 16_384, 65_536, 300_000)
    cached: tuple[int, ...] = (4_096, 16_384, 65_536)
    """Sizes at which all of the text is held as context too."""
    rounds: int = 5
    device: str = "cpu"
    dtype: str = "float32"
    """Of weights and caches; entries of the memory are in bfloat16."""


def fill(memory: AttachedMemory, text: Tensor, size: int) -> None:
    """Let each layer hold so many entries: those of the text, then more like the first of them."""
    memory.clear()
    memory.read(text[:, : min(size, SEED_TOKENS)], progress=False)
    for layer in memory.layers.values():
        (part,) = layer.memories
        known = part.store.oldest(0, part.num_entries[0])
        while (missing := size - part.num_entries[0]) > 0:
            keys = known.keys[:, :, :missing].floats(torch.float32)
            noise = NOISE * keys.norm(dim=-1, keepdim=True) * torch.randn_like(keys) / keys.shape[-1] ** 0.5
            values, origins = known.values[:, :, :missing], known.origins[:, :missing]
            part.commit(StagedEntries([0], Vectors.of(keys + noise, part.dtype), values, origins, None))


def cache_of(model: Any, size: int) -> DynamicCache:
    """A cache that holds random keys and values of so many tokens."""
    config, cache = model.config, DynamicCache()
    shape = (1, config.num_key_value_heads, size, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, *shape, device=model.device, dtype=model.dtype)
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def seconds(model: Any, tokens: Tensor, cache: DynamicCache | None, place: int) -> float:
    """For a call with these tokens, after those in the cache; the cache is afterwards what it was."""
    held = 0 if cache is None else cache.get_seq_length()
    places = torch.arange(place, place + tokens.shape[1], device=model.device)[None]
    wait_for(model.device)
    start = time.perf_counter()
    model(input_ids=tokens, past_key_values=cache, position_ids=places, logits_to_keep=1, use_cache=cache is not None)
    wait_for(model.device)
    taken = time.perf_counter() - start
    if cache is not None:
        cache.crop(held - cache.get_seq_length())
    return taken


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def contestants(model: Any, memory: AttachedMemory, chunk: Tensor, size: int, options: Options) -> dict[str, Callable]:
    """What is measured at one size."""
    local = cache_of(model, CHUNK)

    def bare(tokens: Tensor, cache: DynamicCache | None) -> float:
        with memory.enabled(False):
            return seconds(model, tokens, cache, CHUNK if cache is local else 0)

    found = {
        "read, bare": lambda: bare(chunk, None),
        "read, memory": lambda: seconds(model, chunk, None, 0),
        "write, bare": lambda: bare(chunk[:, :1], local),
        "write, memory": lambda: seconds(model, chunk[:, :1], local, CHUNK),
    }
    if size in options.cached:
        whole = cache_of(model, size)
        found["read, all as context"] = lambda: bare(chunk, whole)
        found["write, all as context"] = lambda: bare(chunk[:, :1], whole)
    return found


def main(options: Options) -> None:
    model, tokenizer = load(options.model, options.device, options.dtype)
    text = tokenizer(options.text.read_text(), return_tensors="pt").input_ids
    memory = attach_memory(
        model, retrieve="tokens", max_memories=max(options.sizes), positions="constant", dtype=torch.bfloat16
    )
    chunk, results = text[:, SEED_TOKENS : SEED_TOKENS + CHUNK].to(model.device), []
    for size in options.sizes:
        fill(memory, text, size)
        named = contestants(model, memory, chunk, size, options)
        times: dict[str, list[float]] = {name: [] for name in named}
        for number in range(options.rounds + 1):
            for name, measure in named.items():
                taken = measure()
                if number:  # the first warms up
                    times[name].append(taken)
        config = model.config
        per_token = 2 * model.dtype.itemsize * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        entry = {"entries": size, "bytes of the memory": memory.num_bytes, "bytes of a cache": size * per_token}
        results.append(entry | {name: statistics.median(each) for name, each in times.items()})
        print(results[-1], [layer.memories[-1].index_in_use for layer in memory.layers.values()], flush=True)
        options.output.write_text(json.dumps({"results": results, **provenance(model.device)}, indent=1))
    print(table(results))
    print(f"({origin(provenance(model.device))}; layers {list(memory.layers)})")


def table(results: list[dict[str, float]]) -> str:
    """Tokens a second, and gigabytes."""
    ways = [
        "read, bare",
        "read, memory",
        "read, all as context",
        "write, bare",
        "write, memory",
        "write, all as context",
    ]
    lines = ["| entries | " + " | ".join(ways) + " | memory | cache |", "|---" * (len(ways) + 3) + "|"]
    for each in results:
        tokens = [(CHUNK if way.startswith("read") else 1) / each[way] if way in each else None for way in ways]
        cells = ["" if rate is None else f"{rate:.3g}" for rate in tokens]
        sizes = [f"{each[name] / 2**30:.2f} GiB" for name in ("bytes of the memory", "bytes of a cache")]
        lines.append(f"| {each['entries']:,} | {' | '.join([*cells, *sizes])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
