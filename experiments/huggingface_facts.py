"""What a pretrained model finds again in a long text that it has read into a memory: a pass key and facts.

    python experiments/huggingface_facts.py MODEL_FOLDER OUTPUT.json --text moby-dick.txt --tokens 300000

Sentences that cannot be guessed are planted in real prose, evenly from its beginning to its end. The text is read once
(each chunk by itself, without looking anything up), and searched with index="auto". Then it goes on for some tokens,
and one of the sentences is begun again. Counted is how often what is written, greedily, holds the answer: with the
memory, and without it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from huggingface_perplexity import attached, load

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.huggingface import AttachedMemory

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
    "The oldest tree in the park of Ravensmoor was a": "walnut",
    "The number of the house of Madame Perrault was": "58",
    "The horse that won the Dunmore cup was named": "Cinnamon",
    "The material of the mask of King Aldous was": "copper",
    "The sister of the clockmaker of Velden was called": "Griselda",
    "The island on which the Petrel was wrecked was": "Sumatra",
    "The only thing that the giant Ombo feared was": "thunder",
    "The trade of the father of Lady Ashgrove was that of a": "cobbler",
    "The flower on the coat of arms of Tregarth was a": "tulip",
    "The day on which the bells of Sarn were cast was a": "Thursday",
}
KEY = "The pass key is", "71432"


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    text: Path
    tokens: int = 300_000
    topk: tuple[int, ...] = (32,)
    bias: tuple[float, ...] = (0.0,)
    """Added to how much the memory is trusted."""
    local: int = 60
    """Tokens of the text after what was read that come before each question."""
    tuned: Path | None = None
    """What experiments/huggingface_tuning.py has written."""
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Planted:
    """A sentence, as question and answer. depth: where in the text, from 0 to 1. kind: pass key or fact."""

    kind: str
    question: str
    answer: str
    depth: float

    @property
    def sentence(self) -> str:
        key = f" Remember it. {self.answer} is the pass key." if self.kind == "pass key" else ""
        return f"\n{self.question} {self.answer}.{key}\n"


def planted() -> list[Planted]:
    """Facts from the beginning to the end, and the pass key in the middle."""
    depths = np.linspace(0.02, 0.98, len(FACTS)).tolist()
    found = [Planted("fact", *pair, depth) for pair, depth in zip(FACTS.items(), depths, strict=True)]
    found.append(Planted("pass key", *KEY, 0.5))
    return sorted(found, key=lambda each: each.depth)


def with_sentences(text: list[int], sentences: list[Planted], tokenizer: Any) -> list[int]:
    """The text, with each sentence at its depth."""
    out, before = [], 0
    for each in sentences:
        place = int(each.depth * len(text))
        out += text[before:place] + tokenizer(each.sentence, add_special_tokens=False).input_ids
        before = place
    return out + text[before:]


def answered(memory: AttachedMemory, tokenizer: Any, before: list[int], each: Planted) -> bool:
    """Whether what is written after these tokens and the question holds the answer."""
    question = tokenizer(f"\n{each.question}", add_special_tokens=False).input_ids
    ids = torch.tensor([before + question], device=memory.model.device)
    written = memory.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return each.answer in tokenizer.decode(written[0, ids.shape[1] :])


def main(options: Options) -> None:
    model, tokenizer = load(options.model, options.device, options.dtype)
    whole = tokenizer(options.text.read_text()).input_ids
    text, local = whole[: options.tokens], whole[options.tokens : options.tokens + options.local]
    sentences = planted()
    tokens = with_sentences(text, sentences, tokenizer)
    memory = attached(model, options.tuned, dtype=torch.bfloat16, max_memories=len(tokens))
    start = time.monotonic()
    memory.read(torch.tensor(tokens), document=options.text.name)
    seconds = time.monotonic() - start
    print(f"{len(tokens):,} tokens in {seconds:.0f} s; {memory}", flush=True)
    results: dict[str, Any] = {"tokens": len(tokens), "seconds reading": seconds, "bytes": memory.num_bytes}
    results["answers"] = [{"kind": each.kind, "question": each.question, "depth": each.depth} for each in sentences]
    for entry, each in zip(results["answers"], sentences, strict=True):
        with memory.enabled(False):
            entry["without"] = answered(memory, tokenizer, local, each)
    learned = [parameter.detach().clone() for parameter in memory.parameters()]
    for topk in options.topk:
        for bias in options.bias:
            object.__setattr__(memory.options, "topk", topk)
            with torch.no_grad():
                for parameter, before in zip(memory.parameters(), learned, strict=True):
                    parameter.copy_(before + bias)
            start = time.monotonic()
            for entry, each in zip(results["answers"], sentences, strict=True):
                entry[f"top {topk}, bias {bias:+.1f}"] = answered(memory, tokenizer, local, each)
            print(f"{(time.monotonic() - start) / len(sentences):.1f} s for an answer")
            print(table(results["answers"]), flush=True)
            results.update(provenance(model.device))
            options.output.write_text(json.dumps(results, indent=1))
    print(f"({origin(results)}; {len(tokens):,} tokens of {options.text.name})")


def table(answers: list[dict[str, Any]], parts: int = 5) -> str:
    """How many were right, by kind, and by how deep they lay."""
    ways = [name for name in answers[0] if name not in ("kind", "question", "depth")]
    lines = ["| | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for kind in ("pass key", "fact"):
        some = [each for each in answers if each["kind"] == kind]
        cells = [f"{sum(each[way] for each in some)} of {len(some)}" for way in ways]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    for part in range(parts):
        some = [each for each in answers if part <= each["depth"] * parts < part + 1]
        name = f"{part / parts:.0%} to {(part + 1) / parts:.0%} of the text"
        cells = [f"{sum(each[way] for each in some)} of {len(some)}" for way in ways]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
