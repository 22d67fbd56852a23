"""One softmax over keys that lie in several places, from what attention to each of them alone gives.

Attention to some keys is a pair: the mean of their values under a softmax over them, and the logarithm of the sum of
the exponentials of their logits (lse). The lse says how much the mean weighs beside others (Milakov and Gimelshein
2018; the same merge as in blockwise and ring attention).

Shapes: B rows, H query heads, T queries, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NOTHING = torch.finfo(torch.float32).min  # the lse of no keys: unlike minus infinity it has gradients

Part = tuple[Tensor, Tensor]
"""out (B, H, T, D) and lse (B, H, T), NOTHING where a query sees no key of this part."""


def merged(parts: Sequence[Part]) -> Part:
    """Attention to all keys of the parts together."""
    first, *others = [out * share for (out, _), share in zip(parts, shares(parts), strict=True)]
    return sum(others, start=first), torch.stack([lse for _, lse in parts]).logsumexp(dim=0)


def shares(parts: Sequence[Part]) -> list[Tensor]:
    """(B, H, T, 1) for each part: how much of the whole attention goes to its keys."""
    return list(torch.stack([lse for _, lse in parts]).softmax(dim=0).unsqueeze(-1).unbind())


def gated(local: Tensor, found: Part, gate: Tensor) -> Tensor:
    """The paper's gate (Wu et al. 2022, section 3.1) between what is local and what was found, each (B, H, T, D).

    gate: (H, 1, 1) logits of the share of what was found; where nothing was, all is local.
    """
    out, lse = found
    of_found = gate.sigmoid() * (lse > NOTHING / 2).unsqueeze(-1)
    return local * (1 - of_found) + out * of_found
