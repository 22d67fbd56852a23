"""What a memory of passages costs a model of transformers: tokens a second beside the same model without it.

    python experiments/recall_cost.py MODEL_FOLDER OUTPUT.json --text moby-dick.txt --sizes 60000 300000

Of each size and content, in turn and several times: writing 128 tokens after a prompt (passages are chosen twice more
while it is written), the time to the first token after prompts of two lengths, and reading chunks of 512 tokens. The
entries are those of the first 8,192 tokens of the text, repeated with noise up to the size. Told are medians of ratios
to the bare model, taken side by side.
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
from huggingface_cost import fill, wait_for
from huggingface_perplexity import load
from torch import Tensor

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.huggingface import attach_memory

WRITTEN, CHUNKS = 128, 4


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    text: Path
    sizes: tuple[int, ...] = (60_000, 300_000)
    content: tuple[str, ...] = ("tokens", "kv")
    largest_kv: int = 60_000
    """Keys and values of all layers are not measured with more tokens than this."""
    prompts: tuple[int, ...] = (64, 512)
    """Tokens in a prompt."""
    kept: str = "bfloat16"
    """The dtype of the memory."""
    rounds: int = 5
    device: str = "cpu"
    dtype: str = "float32"


def seconds(model: Any, work: Callable[[], Any]) -> float:
    wait_for(model.device)
    start = time.perf_counter()
    work()
    wait_for(model.device)
    return time.perf_counter() - start


def writing(model: Any, prompt: Tensor, count: int) -> Callable[[], Any]:
    """Write so many tokens after a prompt (1, N)."""
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **options)


@torch.no_grad()
def reading(model: Any, chunks: Tensor) -> None:
    """Read chunks (N, 512), one after the other, by themselves."""
    for chunk in chunks:
        model(input_ids=chunk[None], logits_to_keep=1)


def measured(options: Options, model: Any, text: Tensor, memory: Any) -> dict[str, float]:
    """Seconds with the memory over seconds without, the median of the rounds."""
    begins = text[20_000:]
    chunks = begins[: CHUNKS * 512].reshape(CHUNKS, 512).to(model.device)

    def read() -> None:
        memory.read(begins[: CHUNKS * 512], progress=False)

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for count in options.prompts:
        first = writing(model, begins[None, :count].to(model.device), 1)
        pairs[f"first token after {count}"] = first, first
    write = writing(model, begins[None, : options.prompts[0]].to(model.device), WRITTEN)
    pairs[f"writing {WRITTEN}"] = write, write
    pairs["reading"] = read, lambda: reading(model, chunks)
    found: dict[str, list[float]] = {name: [] for name in pairs}
    for turn in range(options.rounds + 1):
        for name, (with_memory, bare) in pairs.items():
            took = seconds(model, with_memory)
            with memory.enabled(False):
                alone = seconds(model, bare)
            if turn:  # the first round warms up
                found[name].append(took / alone)
    return {name: statistics.median(each) for name, each in found.items()}


def main(options: Options) -> None:
    model, tokenizer = load(options.model, options.device, options.dtype)
    text = torch.tensor(tokenizer(options.text.read_text()[:200_000]).input_ids)
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for content in options.content:
        for size in options.sizes:
            name = f"{content}, {size:,}"
            if name in results or (content == "kv" and size > options.largest_kv):
                continue
            kept = getattr(torch, options.kept)
            room = size + (options.rounds + 1) * CHUNKS * 512
            memory = attach_memory(model, content=content, tokenizer=tokenizer, dtype=kept, max_memories=room)
            fill(memory, text[None], size)
            results[name] = measured(options, model, text, memory)
            memory.detach()
            results.update(provenance(torch.device(options.device)))
            options.output.write_text(json.dumps(results, indent=1))
            print(name, results[name], flush=True)
    print(table(results))
    print(f"({origin(results)}; {options.rounds} rounds)")


def table(results: dict[str, Any]) -> str:
    """Seconds with the memory over seconds without."""
    rows = {name: found for name, found in results.items() if "reading" in found}
    columns = list(next(iter(rows.values())))
    lines = ["| content, tokens read | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{found[each]:.2f}" for each in columns) + " |" for name, found in rows.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
