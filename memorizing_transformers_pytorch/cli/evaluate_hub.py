"""`evaluate` with a model of transformers: its loss on documents, with its memory and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memorizing_transformers_pytorch.cli.models import chosen_device
from memorizing_transformers_pytorch.cli.options.evaluate import Evaluate
from memorizing_transformers_pytorch.cli.texts import texts_of
from memorizing_transformers_pytorch.evaluation.evaluate import Losses
from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.evaluation.report import markdown
from memorizing_transformers_pytorch.evaluation.summary import summarise
from memorizing_transformers_pytorch.library.readers import open_reader, spans_of
from memorizing_transformers_pytorch.training.settings import to_plain
from memorizing_transformers_pytorch.utils.progress import bar


def evaluate_hub_model(options: Evaluate, folder: Path) -> None:
    """Print the report, and write it. Raises ValueError for options that are for runs, and texts that are too short."""
    for name, default in (("memory", None), ("text_column", None), ("cache", None), ("checkpoint", "last")):
        if getattr(options, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} is for runs")
    if options.source is None:
        raise ValueError("a model of transformers is evaluated on texts that you give: add --source, a file or folder")
    if options.memories is not None and options.retrieve is not None:
        raise ValueError("--retrieve is for a new memory: one on disk is used as it was built")
    texts = texts_of([options.source], "*")
    device = chosen_device(options.device)
    spans = spans_of(options.memories, options.retrieve, options.run)
    reader: Any = open_reader(str(options.run), device, max_memories=None, dtype=None, index=options.index, spans=spans)
    if options.memories is not None:
        reader.load(options.memories, mmap=True)
    tokens = _tokens(options, reader, texts)
    losses: Losses = {"off": [], "memory": []}
    with bar(total=2 * sum(map(len, tokens.values())), unit=" tokens", unit_scale=True) as progress:
        for ids in tokens.values():
            for mode in losses:
                losses[mode].append(_losses(reader.memory, ids, mode == "memory", options.memories is not None))
                progress.update(len(ids))
    scored = [np.isfinite(off) & np.isfinite(on) for off, on in zip(losses["off"], losses["memory"], strict=True)]
    kept = {mode: [each[some] for each, some in zip(own, scored, strict=True)] for mode, own in losses.items()}
    summary = summarise(kept, names=list(tokens), seed=options.seed)
    found = provenance(torch.device(device))
    what = "spans" if reader.is_of_spans else "tokens"
    looks = f"what is in {options.memories}" if options.memories else "what was read before of each document"
    about = f"{options.run}, with a memory of {what} that looks up {looks}, on the documents of {options.source}."
    came_from, same = f"Evaluated {origin(found)}.", "The same weights and local context in each line."
    text = markdown(summary, f"Evaluation of {options.run.name}", about, origin=came_from, same=same)
    print(text)
    content = {"model": str(options.run), "options": to_plain(options), **found, **summary.to_dict()}
    (folder / "evaluation.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (folder / "evaluation.md").write_text(text, encoding="utf-8")


def _losses(memory: Any, ids: torch.Tensor, on: bool, has_library: bool) -> np.ndarray:
    """Of each token after the first, with what is in a folder or else what was read of the document, or without."""
    if has_library or not on:
        with memory.read_only(), memory.enabled(on):
            (found,) = memory.score(ids, progress=False)
    else:
        memory.clear()
        (found,) = memory.score(ids, progress=False)
    return np.asarray(found[1:].numpy(), dtype=np.float32)


def _tokens(options: Evaluate, reader: Any, texts: dict[str, str]) -> dict[str, torch.Tensor]:
    """Of the documents that are long enough, or of those that were drawn."""
    least = max(options.min_tokens, 2)
    found = {name: torch.tensor(reader.tokenizer(text, verbose=False).input_ids) for name, text in texts.items()}
    found = {name: ids for name, ids in found.items() if len(ids) >= least}
    if not found:
        raise ValueError(f"expected documents of at least {least} tokens in {options.source}, got none")
    if options.documents is not None and options.documents < 1:
        raise ValueError(f"expected documents to be at least 1, got {options.documents}")
    if options.documents is not None and options.documents < len(found):
        drawn = np.random.default_rng(options.seed).choice(len(found), options.documents, replace=False)
        found = {name: found[name] for name in (list(found)[n] for n in sorted(drawn))}
    most = options.max_tokens
    return {name: ids if most is None else ids[: most + 1] for name, ids in found.items()}
