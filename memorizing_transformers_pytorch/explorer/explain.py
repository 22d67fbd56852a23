"""What a model with a memory looks up for some tokens, and what each source is worth to them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch.explorer.explanation import Columns, Explanation, Passage
from memorizing_transformers_pytorch.explorer.sources import Sources, decoder, encoded, is_known
from memorizing_transformers_pytorch.explorer.watching import LookedUp, Seen, Watched, watched

CONTRIBUTIONS = (None, "ablate")
COLUMNS = ("token", "layer", "head", "score", "weight", "document", "position", "source_token", "age")


def explain(
    model: Any,
    tokens: Any,
    memories: Any,
    *,
    tokenizer: Any = None,
    row: int = 0,
    contribution: str | None = None,
    passage: int = 64,
    most_passages: int = 16,
    around: int = 12,
) -> Explanation:
    """What a model looks up in its memory for some tokens, which are run as one segment and are not remembered.

    model, memories: a `MemorizingTransformer` and its `KNNMemoryList`, or a model of transformers and the memory that
        is attached to it.
    tokens: token ids (T,) or (1, T); or a text, with a tokenizer.
    tokenizer: of this package or of transformers; without one, texts are numbers.
    row: of the memory.
    contribution: "ablate" measures what each of the `most_passages` most looked-up passages is worth: by how much the
        loss of the tokens rises when its entries are not found, and the next best are instead. (One run for each.)
        Attention alone tells where a model looks, not whether it helps.
    passage: how many tokens of a source count as one passage.
    around: how many tokens of the source to show on either side of an entry.

    Raises ValueError for tokens that the model does not have, or more than it has positions for, a model or row that
    has no memory, an unknown contribution, or sizes below 0.
    """
    if contribution not in CONTRIBUTIONS or passage < 1:
        raise ValueError(f"expected contribution {CONTRIBUTIONS} and passage >= 1, got {contribution!r}, {passage}")
    if most_passages < 0 or around < 0:
        raise ValueError(f"expected most_passages and around of at least 0, got {most_passages}, {around}")
    eye, decode = watched(model, memories, row), decoder(tokenizer)
    ids = encoded(tokens, tokenizer, _vocabulary(model))
    if eye.longest is not None and len(ids) > eye.longest:
        raise ValueError(f"expected at most {eye.longest:,} tokens, the positions of the model, got {len(ids):,}")
    seen = eye.run(ids)
    sources = Sources(eye.memories, row, decode)
    columns, starts = _columns(seen.layers, eye), _starts(seen.layers, eye)
    found = Explanation(
        texts=sources.pieces(ids.tolist()),
        losses=_losses(seen, ids),
        without_memory=_losses(_alone(eye, ids), ids),
        layers=[each.layer for each in seen.layers],
        mass=_mass(seen.layers, len(ids)),
        titles={each.number: each.title for each in eye.ledger.documents()},
        columns=columns,
        passages=[],
        sources=sources,
        starts=starts,
        around=around,
    )
    passages = passages_of(found, passage)
    if contribution == "ablate":
        passages = _ablated(eye, ids, found, passages[:most_passages]) + passages[most_passages:]
    return replace(found, passages=passages)


def _vocabulary(model: Any) -> int:
    embedding = model.token_emb if hasattr(model, "token_emb") else model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _losses(seen: Seen, ids: Tensor) -> np.ndarray:
    """(T,): of each token, as predicted from those before it; the first is NaN."""
    losses = F.cross_entropy(seen.logits[:-1], ids[1:], reduction="none")
    return np.concatenate([[np.nan], losses.numpy()])


def _alone(eye: Watched, ids: Tensor) -> Seen:
    """A run that finds nothing."""
    with eye.blind():
        return eye.run(ids)


def _mass(layers: list[LookedUp], count: int) -> np.ndarray:
    """(L, H, T), also where nothing was looked up."""
    return np.stack([each.weights.sum(-1).numpy() for each in layers]) if layers else np.zeros((0, 0, count))


def _columns(layers: list[LookedUp], eye: Watched) -> Columns:
    parts: dict[str, list[np.ndarray]] = {}
    for each in layers:
        heads, tokens, places = (index.numpy() for index in each.mask.nonzero(as_tuple=True))
        at = heads, tokens, places
        documents, positions, own_tokens = each.origins[at].numpy().T
        shift = np.array([eye.start_of(number) for number in np.unique(documents).tolist()] or [0])
        own = np.searchsorted(np.unique(documents), documents)
        columns = {
            "token": tokens,
            "layer": np.full_like(tokens, each.layer),
            "head": heads,
            "score": each.scores[at].numpy(),
            "weight": each.weights[at].numpy(),
            "document": documents,
            "position": positions - shift[own] if len(own) else positions,
            "source_token": own_tokens,
            "age": each.ages[at].numpy(),
        }
        for name, column in columns.items():
            parts.setdefault(name, []).append(column)
    return {name: np.concatenate(parts[name]) if name in parts else np.zeros(0, dtype=np.int64) for name in COLUMNS}


def _starts(layers: list[LookedUp], eye: Watched) -> dict[int, int]:
    numbers = {number for each in layers for number in each.origins[each.mask][:, 0].tolist()}
    return {number: eye.start_of(number) for number in numbers}


def passages_of(found: Explanation, size: int) -> list[Passage]:
    """The pieces of known sources that were looked up, those with the most attention first."""
    columns = found.columns
    known = is_known(columns["document"], columns["position"])
    keys = np.stack((columns["document"][known], columns["position"][known] // size), axis=1)
    pieces, own = np.unique(keys, axis=0, return_inverse=True)
    weights = np.bincount(own.reshape(-1), columns["weight"][known], minlength=len(pieces))
    heads = max(found.mass.shape[0] * found.mass.shape[1], 1)
    passages = []
    for i in np.argsort(-weights, kind="stable").tolist():
        document, piece = pieces[i].tolist()
        first, last = piece * size, (piece + 1) * size - 1
        text = found.text(document, first, last)
        passages.append(Passage(document, found.title(document), first, last, text, float(weights[i]) / heads))
    return passages


def _ablated(eye: Watched, ids: Tensor, found: Explanation, passages: list[Passage]) -> list[Passage]:
    """The passages with what they are worth, the most first."""
    whole, measured = float(np.nansum(found.losses)), []
    for each in passages:
        start = found.starts.get(each.document, 0)
        with ExitStack() as stack:
            stack.enter_context(eye.without(each.document, start + each.first, start + each.last))
            losses = _losses(eye.run(ids), ids)
        measured.append(replace(each, contribution=float(np.nansum(losses)) - whole))
    return sorted(measured, key=lambda each: -(each.contribution or 0.0))
