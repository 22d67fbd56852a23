"""A causal depthwise convolution over queries and keys, and its start as an induction head.

With a view of the last few tokens, a query can match the place whose preceding tokens look like its own, and the
value there is that of the token that followed: the two-layer induction circuit in one layer ("In-context Learning
and Induction Heads", Olsson et al. 2022; short convolutions after projections as in Primer, So et al. 2021).

Shapes: B rows, T tokens, C channels, W width of the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConv(nn.Module):
    """Each channel of a token becomes a weighted sum of that channel over the last W tokens.

    It starts as the identity: weight 1 on the token itself.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.zeros(channels, width))
        with torch.no_grad():
            self.weight[:, -1] = 1

    def forward(self, x: Tensor, state: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """x (B, T, C), state (B, W - 1, C): the inputs before x, zeros if None -> (B, T, C).

        documents: (B, T), that of each token, 0 for that of the state; sums leave out the others. None for all one.
        """
        before = x.new_zeros(x.shape[0], self.width - 1, x.shape[2]) if state is None else state.to(x)
        inputs = torch.cat((before, x), dim=1)
        if documents is None:
            return F.conv1d(inputs.mT, self.weight.unsqueeze(1), groups=self.weight.shape[0]).mT
        before_too = F.pad(documents, (self.width - 1, 0))
        shifts = [slice(w, w + x.shape[1]) for w in range(self.width)]
        taps = [
            self.weight[:, w] * inputs[:, shift] * (before_too[:, shift] == documents).unsqueeze(-1)
            for w, shift in enumerate(shifts)
        ]
        return sum(taps[1:], start=taps[0]).to(x.dtype)


def induction_taps(width: int) -> tuple[Tensor, Tensor]:
    """Weights (W,) for queries and for keys over the tokens t - W + 1 ... t, newest last.

    Queries look at their own last W - 1 tokens, keys at the W - 1 tokens before them, with the same weights: so the
    query at t matches the key of the place that comes after the same tokens. For W = 4 about (0, .3, .5, .8) and
    (.3, .5, .8, 0).
    """
    decaying = 0.8 * 0.625 ** torch.arange(width - 2, -1, -1)
    zero = torch.zeros(1)
    return torch.cat((zero, decaying)), torch.cat((decaying, zero))
