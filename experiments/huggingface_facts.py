"""What a pretrained model finds again in a long text that it has read into a memory: pass keys and facts.

    python experiments/huggingface_facts.py MODEL_FOLDER OUTPUT.json --text moby-dick.txt --tokens 300000

Sentences that cannot be guessed are planted in real prose, evenly from its beginning to its end; the text is read once
(each chunk by itself, without looking anything up), then each sentence is asked for by its beginning. Counted is how
often what is written, greedily, holds the answer: with the memory, and without it.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from huggingface_perplexity import load

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory

ROOMS = ("kitchen", "library", "cellar", "chapel", "stable", "armoury", "nursery", "attic", "garden", "tower")
ROOMS += ("bakery", "brewery", "dairy", "forge", "gallery", "granary", "kennel", "laundry", "observatory", "vault")
FACTS = {
    "The favourite dish of Queen Ottoline was": "pickled herring",
    "The architect of the Vesper Bridge was": "Ludmilla Okonkwo",
    "The dog of the lighthouse keeper was called": "Thunderbolt",
    "The treaty of Marrow Hill was signed in the year": "1637",
    "The colour of the banner of the Quillfeather family was": "orange",
    "The cure for the sleeping fever was found in": "Patagonia",
    "The captain of the airship Melusine came from": "Norway",
    "The password of the smugglers of Penhallow was": "butterfly",
    "The instrument that Doctor Abernethy played was the": "bassoon",
    "The prize of the great race of Calloway was a": "silver anchor",
}


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    text: Path
    tokens: int = 300_000
    topk: tuple[int, ...] = (32,)
    distance: tuple[int, ...] = (1024,)
    seed: int = 0


@dataclass(frozen=True)
class Planted:
    """A sentence, as question and answer. depth: where in the text, from 0 to 1. kind: pass key or fact."""

    kind: str
    question: str
    answer: str
    depth: float

    @property
    def sentence(self) -> str:
        return f"\n{self.question} {self.answer}.\n"


def planted(seed: int) -> list[Planted]:
    """Twenty pass keys and ten facts, spread alike."""
    chance = random.Random(seed)
    keys = [(f"The pass key of the {room} is", str(chance.randrange(10_000, 100_000))) for room in ROOMS]
    found = []
    for kind, pairs in (("pass key", keys), ("fact", list(FACTS.items()))):
        for (question, answer), depth in zip(pairs, np.linspace(0.02, 0.98, len(pairs)), strict=True):
            found.append(Planted(kind, question, answer, float(depth)))
    return sorted(found, key=lambda each: each.depth)


def with_sentences(text: list[int], sentences: list[Planted], tokenizer: Any) -> list[int]:
    """The text, with each sentence at its depth."""
    out, before = [], 0
    for each in sentences:
        place = int(each.depth * len(text))
        out += text[before:place] + tokenizer(each.sentence, add_special_tokens=False).input_ids
        before = place
    return out + text[before:]


def answered(memory: AttachedMemory, tokenizer: Any, each: Planted) -> bool:
    """Whether what is written after the question holds the answer."""
    inputs = tokenizer(f"\n{each.question}", return_tensors="pt")
    written = memory.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return each.answer in tokenizer.decode(written[0, inputs.input_ids.shape[1] :])


def main(options: Options) -> None:
    model, tokenizer = load(options.model)
    text = tokenizer(options.text.read_text()).input_ids[: options.tokens]
    sentences = planted(options.seed)
    tokens = with_sentences(text, sentences, tokenizer)
    memory = attach_memory(model, max_memories=len(tokens), dtype=torch.bfloat16, index="exact")
    start = time.monotonic()
    with memory.enabled(False):
        memory.read(torch.tensor(tokens), document=options.text.name)
    seconds = time.monotonic() - start
    print(f"{len(tokens):,} tokens in {seconds:.0f} s; {memory}", flush=True)
    results: dict[str, Any] = {"tokens": len(tokens), "seconds reading": seconds, "bytes": memory.num_bytes}
    results["answers"] = [{"kind": each.kind, "question": each.question, "depth": each.depth} for each in sentences]
    for entry, each in zip(results["answers"], sentences, strict=True):
        with memory.enabled(False):
            entry["without"] = answered(memory, tokenizer, each)
    for topk in options.topk:
        for distance in options.distance:
            for name, value in {"topk": topk, "distance": distance}.items():
                object.__setattr__(memory.options, name, value)
            start = time.monotonic()
            for entry, each in zip(results["answers"], sentences, strict=True):
                entry[f"top {topk}, distance {distance:,}"] = answered(memory, tokenizer, each)
            print(f"{(time.monotonic() - start) / len(sentences):.1f} s for an answer")
            print(table(results["answers"]), flush=True)
            results.update(provenance(torch.device("cpu")))
            options.output.write_text(json.dumps(results, indent=1))
    print(f"({origin(results)}; {len(tokens):,} tokens of {options.text.name})")


def table(answers: list[dict[str, Any]], parts: int = 5) -> str:
    """How many were right, by kind, and by how deep they lay."""
    ways = [name for name in answers[0] if name not in ("kind", "question", "depth")]
    lines = ["| | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for kind in ("pass key", "fact"):
        some = [each for each in answers if each["kind"] == kind]
        lines.append(f"| {kind}s | " + " | ".join(f"{sum(each[way] for each in some)} of {len(some)}" for way in ways))
    for part in range(parts):
        some = [each for each in answers if part <= each["depth"] * parts < part + 1]
        name = f"{part / parts:.0%} to {(part + 1) / parts:.0%} of the text"
        lines.append(f"| {name} | " + " | ".join(f"{sum(each[way] for each in some)} of {len(some)}" for way in ways))
    return "\n".join(lines) + " |"


if __name__ == "__main__":
    main(tyro.cli(Options))
