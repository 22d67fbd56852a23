"""What a model with a memory looks up for some tokens, and what each source is worth to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.explorer.explanation import Explanation, Passage
from memorizing_transformers_pytorch.explorer.passages import explain_passages
from memorizing_transformers_pytorch.explorer.sources import Sources, decoder, encoded
from memorizing_transformers_pytorch.explorer.watching import (
    COLUMNS,
    AttachedModel,
    LookedUp,
    OurModel,
    PassageModel,
    Watched,
    hiding,
    losses_of,
    watched,
)


def explain(
    model: nn.Module,
    tokens: Any,
    memories: Any,
    *,
    tokenizer: Any = None,
    row: int = 0,
    contribution: Literal["ablate"] | None = None,
    passage: int = 64,
    most_passages: int = 16,
    around: int = 12,
    prompt: int = 0,
    question: str | Sequence[int] | Tensor | None = None,
) -> Explanation:
    """What a model looks up in its memory for some tokens, which are run as one segment and are not remembered.

    model, memories: a `MemorizingTransformer` and its `KNNMemoryList`, or a model of transformers and the memory that
        is attached to it.
    tokens: token ids (T,) or (1, T); a text, with a tokenizer; an `Answer` of a memory of passages, or its `Asked`.
    tokenizer: of this package or of transformers; without one, texts are numbers, unless the memory has a tokenizer.
    row: of the memory.
    contribution: "ablate" measures what each of the `most_passages` most looked-up passages is worth: by how much the
        loss of the tokens rises when its entries are not found, and the next best are instead. (One run for each.)
        Attention alone tells where a model looks, not whether it helps.
    passage: how many tokens of a source count as one passage.
    around: how many tokens of the source to show on either side of an entry.
    prompt: how many of the tokens were given; the losses are those of the tokens that were written after them.

    Of a memory of passages (`attach_memory` with retrieve="spans"), passages are those that stood before the tokens.
    They are found as `generate` finds them: by the last tokens of the prompt (without a prompt, nothing stands before
    the first `every` tokens), and by those before the last token of each block of `every` tokens. question: by which
    they are found instead. Of an answer, they are those in its prompt. "ablate" takes a passage away, and nothing takes
    its place.

    Raises ValueError for tokens that the model does not have, or more than it has positions for, a model or row that
    has no memory, an unknown contribution, sizes below 0, more of a prompt than there are tokens, or a question to a
    memory of tokens.
    """
    _check(contribution, passage, most_passages, around)
    asked, placed = getattr(tokens, "asked", tokens), None
    if hasattr(asked, "written"):
        tokens, prompt, question = torch.cat((asked.prompt, asked.written)), len(asked.prompt), asked.question
        row, placed = asked.row, asked.placed
    tokenizer = getattr(memories, "tokenizer", None) if tokenizer is None else tokenizer
    eye, decode = watched(model, memories, row, prompt, question, placed), decoder(tokenizer)
    ids = encoded(tokens, tokenizer, _vocabulary(model))
    if not 0 <= prompt <= len(ids):
        raise ValueError(f"the prompt has 0 to {len(ids)} of the tokens, got prompt={prompt}")
    if eye.longest is not None and len(ids) > eye.longest:
        raise ValueError(f"expected at most {eye.longest:,} tokens, the positions of the model, got {len(ids):,}")
    if isinstance(eye, PassageModel):
        found = explain_passages(eye, ids, decode, around)
    else:
        found = _explained(eye, ids, prompt, Sources(eye.memories, row, decode), around)
        found = replace(found, passages=found.passages_by(passage))
    if contribution == "ablate":
        some, rest = found.passages[:most_passages], found.passages[most_passages:]
        found = replace(found, passages=_ablated(eye, ids, prompt, replace(found, passages=some)) + rest)
    return found


def _check(contribution: str | None, passage: int, most_passages: int, around: int) -> None:
    if contribution not in (None, "ablate") or passage < 1:
        raise ValueError(f"expected contribution None or 'ablate', passage >= 1, got {contribution!r}, {passage}")
    if most_passages < 0 or around < 0:
        raise ValueError(f"expected most_passages and around of at least 0, got {most_passages}, {around}")


def _explained(eye: OurModel | AttachedModel, ids: Tensor, prompt: int, sources: Sources, around: int) -> Explanation:
    """What was looked up in a memory of tokens, without passages."""
    trace = eye.run(ids)
    with eye.blind():
        alone = eye.run(ids)
    columns = _columns(trace.layers)
    documents, own = np.unique(columns["document"], return_inverse=True)
    starts = {number: eye.start_of(number) for number in documents.tolist()}
    columns["position"] = columns["position"] - np.array(list(starts.values()), dtype=np.int64)[own]
    return Explanation(
        texts=sources.pieces(ids.tolist()),
        losses=losses_of(trace.logits, ids, prompt),
        without_memory=losses_of(alone.logits, ids, prompt),
        layers=[each.layer for each in trace.layers],
        mass=_mass(trace.layers, len(ids)),
        titles={each.number: each.title for each in eye.ledger.documents()},
        columns=columns,
        passages=[],
        sources=sources,
        starts=starts,
        around=around,
    )


def _vocabulary(model: Any) -> int:
    embedding = model.token_emb if hasattr(model, "token_emb") else model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _mass(layers: list[LookedUp], count: int) -> np.ndarray:
    """(L, H, T), also where nothing was looked up."""
    return np.stack([each.weights.sum(-1).numpy() for each in layers]) if layers else np.zeros((0, 0, count))


def _columns(layers: list[LookedUp]) -> dict[str, np.ndarray]:
    """The table of all layers. Positions are places in what the row has read."""
    parts: list[list[np.ndarray]] = [[] for _ in COLUMNS]
    for each in layers:
        found = heads, tokens, _ = each.mask.nonzero(as_tuple=True)
        layer = torch.full_like(tokens, each.layer)
        origins = each.origins[found].unbind(-1)
        columns = (tokens, layer, heads, each.scores[found], each.weights[found], *origins, each.ages[found])
        for part, column in zip(parts, columns, strict=True):
            part.append(column.numpy())
    return {n: np.concatenate(p) if p else np.zeros(0, np.int64) for n, p in zip(COLUMNS, parts, strict=True)}


def _ablated(eye: Watched, ids: Tensor, prompt: int, found: Explanation) -> list[Passage]:
    """The passages with what they are worth, the most first."""
    whole, measured = float(np.nansum(found.losses)), []
    for each in found.passages:
        start = found.starts.get(each.document, 0)
        with hiding(eye, each.document, start + each.first, start + each.last):
            losses = losses_of(eye.run(ids).logits, ids, prompt)
        measured.append(replace(each, contribution=float(np.nansum(losses)) - whole))
    return sorted(measured, key=lambda each: -(each.contribution or 0.0))
