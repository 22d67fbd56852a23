"""Which layers make use of a memory: those with induction heads (Olsson et al. 2022).

On random tokens that are repeated, an induction head attends from a token of the second run to the one that came after
it in the first. Only such layers copy from a memory without training.

Shapes: B rows, H query heads, T tokens, D head width.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor

from memorizing_transformers_pytorch.huggingface.models import positions_of, run, vocabulary_of
from memorizing_transformers_pytorch.huggingface.probe import Layer, Probed, probe, refusing, watching
from memorizing_transformers_pytorch.utils.durable import replacing
from memorizing_transformers_pytorch.utils.fingerprint import Weights
from memorizing_transformers_pytorch.utils.plain_json import read_object

REPEATED = 64  # random tokens, twice; fewer for models that have fewer positions
ROWS = 4
ENOUGH = 0.2  # of its attention; the rest of the layers of SmolLM2-135M have less than 0.06
CACHE = Path(HF_HOME) / "memorizing_transformers_pytorch"


def suggest_layers(model: Any) -> dict[int, float]:
    """The induction score of each layer that can have a memory, best first: the attention, of its best head, from the
    second occurrence of random tokens to what came after the first.

    Raises ValueError for a model that cannot have a memory.
    """
    served, _ = probe(model)
    return induction_scores(model, served)


def induction_scores(model: Any, served: dict[int, Layer]) -> dict[int, float]:
    """As `suggest_layers`, of these layers."""
    scores = {index: max(heads) for index, heads in induction_heads(model, served).items()}
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def induction_heads(model: Any, served: dict[int, Layer]) -> dict[int, list[float]]:
    """The induction score of each head (H) of these layers; once for each checkpoint, then from a file in the cache of
    Hugging Face."""
    path = CACHE / f"induction-heads-{Weights(model).fingerprint()}.json"
    try:
        scores = {int(index): [float(score) for score in heads] for index, heads in read_object(path).items()}
        if {index: len(heads) for index, heads in scores.items()} == {i: each.heads for i, each in served.items()}:
            return scores
    except (OSError, OverflowError, TypeError, ValueError):  # not there, or not whole: it is made anew
        pass
    scores = _measured(model, served)
    with contextlib.suppress(OSError):  # a cache that cannot be written to
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(json.dumps(scores), encoding="utf-8")
    return scores


def _measured(model: Any, served: dict[int, Layer]) -> dict[int, list[float]]:
    repeated = min(REPEATED, (positions_of(model) or 2 * REPEATED) // 2)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary_of(model), (ROWS, repeated), generator=random).repeat(1, 2)
    with refusing(model), watching(model, {index: layer.module for index, layer in served.items()}) as seen:
        run(model, tokens)
        return {index: _scores(seen[index]) for index in served}


def chosen_layers(model: Any, served: dict[int, Layer]) -> list[int]:
    """All from a tenth of the depth before the first induction head on; without one, the layer that comes nearest.

    On SmolLM2-135M these layers were worth more than the induction heads alone, and layers before them did harm.
    """
    scores = induction_scores(model, served)
    heads = [index for index, score in scores.items() if score >= ENOUGH]
    if not heads:
        return list(scores)[:1]
    first = min(heads) - (max(scores) + 1) // 10
    return sorted(index for index in scores if index >= first)


def _scores(seen: Probed) -> list[float]:
    assert seen.query is not None
    assert seen.local is not None
    query = seen.query
    logits = seen.local.masked(query, slice(0, query.shape[2]), query.shape[2])
    weights: Tensor = logits.softmax(dim=-1)
    repeated = query.shape[2] // 2
    later = torch.arange(repeated, 2 * repeated - 1, device=weights.device)
    scores: list[float] = weights[:, :, later, later - repeated + 1].mean(dim=(0, 2)).tolist()
    return scores
