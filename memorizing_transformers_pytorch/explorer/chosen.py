"""Of what was looked up, only what one layer or one head found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from memorizing_transformers_pytorch.explorer.explain import passages_of
from memorizing_transformers_pytorch.explorer.explanation import Explanation


def chosen(found: Explanation, passage: int, layer: int | None = None, head: int | None = None) -> Explanation:
    """passage: how many tokens of a source count as one passage. layer, head: all unless given; heads have the same
    numbers in every layer. What a passage is worth was measured with all of them, and stays."""
    if layer is None and head is None:
        return found
    kept = np.ones(len(found), dtype=bool)
    mass, layers = found.mass, found.layers
    if layer is not None:
        kept &= found.columns["layer"] == layer
        own = [i for i, number in enumerate(layers) if number == layer]
        mass, layers = mass[own], [layer for _ in own]
    if head is not None:
        kept &= found.columns["head"] == head
        mass = mass[:, [head]] if head < mass.shape[1] else mass[:, :0]
    part = replace(
        found, mass=mass, layers=layers, columns={name: column[kept] for name, column in found.columns.items()}
    )
    worth = {(each.document, each.first): each.contribution for each in found.passages}
    passages = [
        replace(each, contribution=worth.get((each.document, each.first))) for each in passages_of(part, passage)
    ]
    return replace(part, passages=passages)
