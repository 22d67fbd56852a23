"""What a memory is worth to a pretrained model that was not trained for it: perplexity on passages of long texts.

    python experiments/huggingface_perplexity.py MODEL_FOLDER OUTPUT.json --texts moby-dick.txt hamlet.md --passages 8

MODEL_FOLDER holds a model of transformers, or one .gguf file. Of each passage of 4,096 tokens the later half is scored:
with local context only (chunks of 512), with a memory of the first half, with a memory of as much of another text, with
that of the first half but its values shuffled, and with the whole passage as context. For longer memories and contexts
the text before the passage is read too. What comes before the later half is read chunk by chunk without looking
anything up. Passages that OUTPUT.json has already are not measured again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.evaluation.summary import drawn_means
from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory, suggest_layers

HALF = 2_048


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    texts: tuple[Path, ...]
    passages: int = 8
    """Of each text, evenly spread."""
    layers: tuple[int, ...] = ()
    """Those with a memory; chosen by their induction heads unless given."""
    topk: int = 32
    longer: tuple[int, ...] = ()
    """Tokens of the text before the passage's later half to read, beside the 2,048 of the first."""
    only: tuple[str, ...] = ()
    """Measure these modes alone, such as local, "memory", "full context"."""
    longest: int | None = None
    """Length of a passage that is all context, beside the 4,096."""
    tuned: Path | None = None
    """What experiments/huggingface_tuning.py has written."""
    device: str = "cpu"
    dtype: str = "float32"


def load(folder: Path, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """Model, on the device, and tokenizer."""
    files = list(folder.glob("*.gguf"))
    where = {"gguf_file": files[0].name} if files else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="sdpa", **where)
    return model.eval().to(device, getattr(torch, dtype)), AutoTokenizer.from_pretrained(folder, **where)


def starts(length: int, passages: int, before: int) -> list[int]:
    """Where the later halves of passages begin, evenly spread, with so many tokens before each."""
    return np.linspace(before, length - HALF, passages).astype(int).tolist()


@torch.no_grad()
def with_all(model: Any, tokens: Tensor) -> float:
    """The loss of the last 2,048 tokens but the first of them, with everything before as context."""
    tokens = tokens.to(model.device)
    logits = model(input_ids=tokens[None], logits_to_keep=HALF, use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits.float(), tokens[1 - HALF :]))


def after(memory: AttachedMemory, before: Tensor, later: Tensor) -> float:
    """The loss of the later tokens after the others were read."""
    read(memory, before)
    return loss(memory, later)


def read(memory: AttachedMemory, tokens: Tensor) -> None:
    """Into an empty memory, without looking anything up."""
    memory.clear()
    memory.read(tokens, progress=False)


def loss(memory: AttachedMemory, tokens: Tensor) -> float:
    """Of all but the first, while they are read."""
    (losses,) = memory.score(tokens, progress=False)
    return float(losses[1:].mean())


def modes(
    model: Any, memory: AttachedMemory, text: Tensor, other: Tensor, options: Options
) -> dict[str, Callable[[int], float]]:
    """The loss of the half that begins at a place in the text, by what the model knows of what came before."""

    def local(place: int) -> float:
        with memory.enabled(False):
            return after(memory, text[:1], text[place : place + HALF])

    def full(place: int, before: int = HALF) -> float:
        with memory.enabled(False):
            return with_all(model, text[place - before : place + HALF])

    def remembered(place: int, before: int = HALF) -> float:
        return after(memory, text[place - before : place], text[place : place + HALF])

    def shuffled(place: int) -> float:
        read(memory, text[place - HALF : place])
        for layer in memory.layers.values():
            for part in layer.memories:
                random = torch.Generator().manual_seed(place)
                count = part.num_entries[0]
                values = part.store.values[0, :, :count]
                values.copy_(values[:, torch.randperm(count, generator=random).to(values.device)].clone())
        return loss(memory, text[place : place + HALF])

    found: dict[str, Callable[[int], float]] = {
        "local": local,
        "memory": remembered,
        "memory of another text": lambda place: after(memory, other[:HALF], text[place : place + HALF]),
        "values shuffled": shuffled,
        "full context": full,
    }
    longer = {f"memory of {n:,}": functools.partial(remembered, before=n) for n in options.longer}
    if options.longest is not None:
        longer[f"full context of {options.longest:,}"] = functools.partial(full, before=options.longest - HALF)
    return {name: measure for name, measure in (found | longer).items() if not options.only or name in options.only}


def attached(model: Any, tuned: Path | None, **options: Any) -> AttachedMemory:
    """A memory, as it was tuned if it was."""
    memory = attach_memory(model, retrieve="tokens", **options)
    if tuned is not None and (tuned / "adapter_config.json").is_file():
        from peft import PeftModel

        PeftModel.from_pretrained(model, tuned)
    elif tuned is not None:
        memory.load_parameters(tuned / "memory.safetensors")
    return memory


def main(options: Options) -> None:
    model, tokenizer = load(options.model, options.device, options.dtype)
    print({index: round(score, 2) for index, score in list(suggest_layers(model).items())[:10]}, flush=True)
    chosen: Any = options.layers or "auto"
    memory = attached(model, options.tuned, layers=chosen, topk=options.topk, index="exact", max_memories=131_072)
    print(memory, flush=True)
    results = json.loads(options.output.read_text()) if options.output.is_file() else {"losses": {}}
    texts = [tokenizer(path.read_text(), return_tensors="pt").input_ids[0] for path in options.texts]
    for i, (path, text) in enumerate(zip(options.texts, texts, strict=True)):
        losses = results["losses"].setdefault(path.stem, {})
        before = max(HALF, *options.longer, (options.longest or HALF) - HALF) if options.longer else HALF
        for place in starts(len(text), options.passages, before):
            for name, measure in modes(model, memory, text, texts[i - 1], options).items():
                if str(place) not in losses.setdefault(name, {}):
                    losses[name][str(place)] = measure(place)
                    results.update(layers=list(memory.layers), topk=options.topk, **provenance(model.device))
                    options.output.write_text(json.dumps(results, indent=1))
        print(
            path.stem,
            {name: round(float(np.exp(np.mean(list(each.values())))), 2) for name, each in losses.items()},
            flush=True,
        )
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Perplexities, and the share of the way from local to full context. In brackets 95% intervals over passages; those
    of the change against local context are paired."""
    lines = ["| text | " + " | ".join(next(iter(results["losses"].values()))) + " | share of the way |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for name, losses in results["losses"].items():
        sums = np.array([list(each.values()) for each in losses.values()])
        draws = drawn_means(sums, np.ones(sums.shape[1]))
        changes = changes_against_first(sums, draws) if next(iter(losses)) == "local" else {}
        cells = []
        for row, mean in enumerate(sums.mean(axis=1)):
            low, high = np.exp(np.percentile(draws[row], [2.5, 97.5])) if draws is not None else (np.nan, np.nan)
            cells.append(f"{np.exp(mean):.2f} [{low:.1f}, {high:.1f}]{changes.get(row, '')}")
        means = dict(zip(losses, np.exp(sums.mean(axis=1)), strict=True))
        whole = {"local", "memory", "full context"} <= set(means)
        share = (means["local"] - means["memory"]) / (means["local"] - means["full context"]) if whole else np.nan
        lines.append(f"| {name} | {' | '.join(cells)} | {share:.0%} |")
    return "\n".join(lines) + f"\n\n({origin(results)}; layers {results['layers']}, top {results['topk']})"


def changes_against_first(losses: np.ndarray, draws: np.ndarray | None) -> dict[int, str]:
    """Of perplexity, in each row of losses (modes, passages) but the first; draws: means of as many (modes, draws)."""
    found = {}
    for row in range(1, len(losses)):
        change = np.expm1(losses[row].mean() - losses[0].mean())
        found[row] = f", {change:+.1%}"
        if draws is not None:
            low, high = np.expm1(np.percentile(draws[row] - draws[0], [2.5, 97.5]))
            found[row] += f" [{low:+.1%}, {high:+.1%}]"
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
