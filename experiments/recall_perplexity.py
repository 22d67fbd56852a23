"""What passages recalled while a text is read are worth, beside a window of as many positions, and full context.

    python experiments/recall_perplexity.py MODEL_FOLDER OUTPUT.json --texts moby-dick.txt hamlet.md --passages 4

Of each passage of 4,096 tokens the later half is scored, in chunks of 512: with nothing before
a chunk; with the last 128 tokens before it, and with so many more that they take as many positions as recalled passages
do (a sliding window); with the last 128 and passages from the memory, chosen anew for every 128 tokens by the 32 before
them; and with everything before as context. The share is that of the way from nothing to everything, in loss.
Passages that OUTPUT.json has already are not measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from huggingface_perplexity import HALF, load, starts, with_all
from torch import Tensor

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.evaluation.summary import drawn_means
from memorizing_transformers_pytorch.huggingface import attach_memory

CHUNK, RECENT = 512, 128


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    texts: tuple[Path, ...]
    passages: int = 4
    """Of each text, evenly spread."""
    recalled: tuple[int, ...] = (6, 16)
    """How many passages of 80 tokens stand before each block: 6 take 484 positions, 16 take 1,284."""
    content: tuple[str, ...] = ("kv",)
    device: str = "cpu"
    dtype: str = "float32"


@torch.no_grad()
def in_window(model: Any, text: Tensor, place: int, recent: int) -> float:
    """The loss of the half that begins here, in chunks, with so many tokens before each."""
    losses, step = [], CHUNK - min(recent, RECENT)
    for start in range(place, place + HALF, step):
        stop = min(start + step, place + HALF)
        tokens = text[start - recent : stop].to(model.device)
        logits = model(input_ids=tokens[None], logits_to_keep=stop - start + 1, use_cache=False).logits[0]
        # With nothing before it, the first token of a chunk cannot be predicted; of the half, none predicts the first.
        first = 1 if recent == 0 or start == place else 0
        known = logits[first:-1] if recent else logits[:-1]
        losses.append(torch.nn.functional.cross_entropy(known.float(), tokens[-len(known) :], reduction="none").cpu())
    return float(torch.cat(losses).mean())


def remembered(memory: Any, text: Tensor, place: int, count: int) -> float:
    """The loss of the half that begins here, read after the half before as one text, with so many passages."""
    object.__setattr__(memory.options, "passages", count)
    memory.clear()
    (losses,) = memory.score(text[place - HALF : place + HALF], progress=False)
    return float(losses[HALF + 1 :].mean())


def modes(options: Options, model: Any, text: Tensor) -> dict[str, Callable[[int], float]]:
    """The loss of the half that begins at a place in the text, by what stands before each chunk."""
    found: dict[str, Callable[[int], float]] = {
        "nothing": lambda place: in_window(model, text, place, 0),
        f"the last {RECENT}": lambda place: in_window(model, text, place, RECENT),
        "full context": lambda place: with_all(model, text[place - HALF : place + HALF]),
    }
    for count in options.recalled:
        more = 4 + 80 * count
        found[f"the last {RECENT + more}"] = lambda place, more=more: in_window(model, text, place, RECENT + more)

        def passages(place: int, content: str, count: int) -> float:
            memory = attach_memory(model, retrieve="spans", content=content)
            loss = remembered(memory, text, place, count)
            memory.detach()
            return loss

        for content in options.content:
            name = f"the last {RECENT} and {count} passages, {content}"
            found[name] = lambda place, content=content, count=count: passages(place, content, count)
    return found


def measured(options: Options, model: Any, tokenizer: Any, found: dict[str, Any]) -> None:
    """Fill in what is not known yet."""
    for path in options.texts:
        text = torch.tensor(tokenizer(path.read_text()).input_ids)
        for place in starts(len(text), options.passages, HALF):
            losses = found.setdefault(path.name, {}).setdefault(str(place), {})
            for name, measure in modes(options, model, text).items():
                if name not in losses:
                    begun = time.monotonic()
                    losses[name] = measure(place)
                    print(
                        f"{path.name} {place} {name}: {losses[name]:.3f} ({time.monotonic() - begun:.0f} s)", flush=True
                    )
                    found["made"] = provenance(model.device)
                    options.output.write_text(json.dumps(found, indent=1))


def table(found: dict[str, Any]) -> str:
    """Perplexity and share of the way to full context, with an interval of 95% over the passages of all texts."""
    texts = [name for name in found if name != "made"]
    names = list(next(iter(found[texts[0]].values())))
    lines = ["| before each chunk | " + " | ".join(texts) + " | share of the way |", "|---" * (len(texts) + 2) + "|"]
    for name in names:
        cells = []
        for text in texts:
            losses = [
                np.array([each[some] for each in found[text].values()]) for some in (name, "nothing", "full context")
            ]
            share = (losses[1].mean() - losses[0].mean()) / (losses[1].mean() - losses[2].mean())
            cells.append(f"{np.exp(losses[0].mean()):.1f} ({share:.0%})")
        every = [each for text in texts for each in found[text].values()]
        gains = np.array([[each["nothing"] - each[name], each["nothing"] - each["full context"]] for each in every])
        draws = drawn_means(gains.T, np.ones(len(gains), dtype=int))
        shares = gains.mean(axis=0)[:, None] if draws is None else draws
        shares = shares[0] / shares[1]
        low, high = np.quantile(shares, [0.025, 0.975])
        share = gains[:, 0].mean() / gains[:, 1].mean()
        lines.append(f"| {name} | {' | '.join(cells)} | {share:.0%} ({low:.0%} to {high:.0%}) |")
    return "\n".join(lines)


def main(options: Options) -> None:
    model, tokenizer = load(options.model, options.device, options.dtype)
    found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    measured(options, model, tokenizer, found)
    print(table(found))
    print(f"({origin(found['made'])})")


if __name__ == "__main__":
    main(tyro.cli(Options))
