"""Tune a pretrained model with a memory, in less than an hour on a CPU: what is learned, and what it is worth.

    python experiments/huggingface_tuning.py MODEL_FOLDER OUTPUT_FOLDER --texts FILE ... --how lora --minutes 30

Passages are read segment by segment, each remembered after its backward pass, with a new passage when one ends. Learned
are, with the model itself frozen: the biases with which local attention and the memory are joined ("biases"); these and
LoRA on the queries of the memory layers ("lora"); or the same without a memory, to know what LoRA alone is worth
("lora-local").
experiments/huggingface_perplexity.py --tuned OUTPUT_FOLDER measures the result.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from huggingface_perplexity import load
from peft import LoraConfig, get_peft_model
from torch import Tensor

from memorizing_transformers_pytorch.evaluation.provenance import provenance
from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory

SEGMENT = 512


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    texts: tuple[Path, ...]
    how: Literal["biases", "lora", "lora-local"] = "lora"
    minutes: float = 30
    rank: int = 8
    topk: int = 32
    segments: int = 8
    """Of 512 tokens in each passage."""
    before: int = 8_192
    """Tokens that are read before every other passage, each chunk by itself, so that older memories are learned too."""
    bias_rate: float = 0.05
    rate: float = 1e-3
    seed: int = 0
    device: str = "cpu"


def attached(model: Any, topk: int) -> AttachedMemory:
    """The memory that is tuned."""
    return attach_memory(model, retrieve="tokens", layers="auto", topk=topk, index="exact", max_memories=131_072)


def with_adapter(model: Any, memory: AttachedMemory, rank: int) -> Any:
    """The model, frozen but for the biases and LoRA on the queries of the memory layers."""
    queries = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj"],
        layers_to_transform=list(memory.layers),
        modules_to_save=["memory_bias"],
    )
    return get_peft_model(model, queries)


def passages(texts: list[Tensor], size: int, seed: int) -> Any:
    """Passages (1, size) from anywhere in the texts, each text as often as it is long, for ever."""
    chance = random.Random(seed)
    while True:
        (text,) = chance.choices(texts, [len(text) for text in texts])
        start = chance.randrange(len(text) - size)
        yield text[None, start : start + size]


def main(options: Options) -> None:
    model, tokenizer = load(options.model, options.device)
    texts = [tokenizer(path.read_text(), return_tensors="pt").input_ids[0].to(model.device) for path in options.texts]
    size = SEGMENT * options.segments + options.before
    texts = [text for text in texts if len(text) > size]
    print(f"{len(texts)} texts, {sum(map(len, texts)):,} tokens", flush=True)
    memory = attached(model.requires_grad_(False), options.topk)
    tuned = with_adapter(model, memory, options.rank) if options.how.startswith("lora") else model
    for parameter in memory.parameters():
        parameter.requires_grad_(options.how != "lora-local")
    ours = {id(parameter) for parameter in memory.parameters()}
    learned = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in learned if id(each) in ours], "lr": options.bias_rate},
        {"params": [each for each in learned if id(each) not in ours], "lr": options.rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    print(sum(each.numel() for each in learned), "numbers learned", flush=True)
    log = train(tuned, memory, optimizer, passages(texts, size, options.seed), options)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.how.startswith("lora"):
        tuned.save_pretrained(options.output)
    memory.save_parameters(options.output / "memory.safetensors")
    said = {key: str(value) for key, value in asdict(options).items()}
    report = {"options": said, "log": log, **provenance(memory.model.device)}
    (options.output / "tuning.json").write_text(json.dumps(report, indent=1))


def train(model: Any, memory: AttachedMemory, optimizer: Any, source: Any, options: Options) -> list[Any]:
    """A step for each segment, rates fall to zero -> [minutes, place in the passage, loss] of each."""
    model.train()
    start, log = time.monotonic(), []
    rates = [group["lr"] for group in optimizer.param_groups]
    while (share := (time.monotonic() - start) / 60 / options.minutes) < 1:
        memory.clear()
        before, passage = next(source).tensor_split([options.before], dim=1)
        if options.how != "lora-local" and options.before and len(log) // options.segments % 2:
            memory.read(before, progress=False)
        for place, segment in enumerate(passage.split(SEGMENT, dim=1)):
            share = min((time.monotonic() - start) / 60 / options.minutes, 1.0)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, len(log) / 20) * (1 - share)
            with contextlib.nullcontext() if options.how == "lora-local" else memory.writing():
                loss = model(input_ids=segment, labels=segment).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            log.append([share * options.minutes, place, loss.item()])
            if len(log) % 40 == 0:
                recent = [loss for _, place, loss in log[-40:] if place]
                print(f"{len(log)} steps, {share:.0%}: {sum(recent) / len(recent):.3f}", flush=True)
    return log


if __name__ == "__main__":
    main(tyro.cli(Options))
