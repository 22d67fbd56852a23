"""Turning queries and keys by the rotary position embeddings (Su et al. 2021) of any family, with its own function.

A family hands its layers cosines and sines in a layout of its own, so angles are read off those of position 1 and
handed back in the same layout.

Shapes: B rows, H heads, T tokens, D head width, C numbers in a row of cosines (D, fewer where only a part is turned, or
half of them).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CosSin = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rotary:
    """How one layer turns.

    turn: the family's function of queries, keys, cosines (B, T, C) and sines. angles: (C,) float64, by which one
    position turns. scale: by which it also lengthens (YaRN), both queries and keys.
    """

    turn: Turn
    angles: Tensor
    scale: float

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, T, D), turned on by so many positions (B, T) or (B, 1), in float32."""
        angles = positions.double().unsqueeze(-1).to(self.angles.device) * self.angles
        return self._apply(x, angles.cos().float(), angles.sin().float())

    def unturned(self, x: Tensor, position_embeddings: CosSin) -> Tensor:
        """x (B, H, T, D) turned back to position 0, as long as the family has made it, in float32."""
        cos, sin = (part.float() / self.scale for part in position_embeddings)
        return self._apply(x, cos, -sin)

    def refined(self, position_embeddings: CosSin, place: int) -> Rotary:
        """With angles as precise as this later place shows them, half precision being too coarse at the first."""
        cos, sin = (part[0, -1].double() for part in position_embeddings)
        error = torch.atan2(sin, cos) - place * self.angles
        return replace(self, angles=self.angles + torch.atan2(error.sin(), error.cos()) / place)

    def _apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Where a layer turns only a part of each head, its function is given that part, or takes it by itself."""
        x, cos, sin = x.float(), cos.to(x.device), sin.to(x.device)
        try:
            return self.turn(x, x, cos, sin)[0]
        except RuntimeError:
            part = cos.shape[-1]
            return torch.cat((self.turn(x[..., :part], x[..., :part], cos, sin)[0], x[..., part:]), dim=-1)


def rotary_of(attention: nn.Module, position_embeddings: object) -> Rotary | None:
    """How this layer turns, read off the cosines and sines (1, 2, C) of positions 0 and 1; None if it does not so."""
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    pair = isinstance(position_embeddings, tuple) and len(position_embeddings) == 2
    if turn is None or not pair or not all(isinstance(part, Tensor) for part in position_embeddings):  # type: ignore[attr-defined]
        return None
    cos, sin = (part[0].detach().double() for part in position_embeddings)  # type: ignore[attr-defined]
    return Rotary(turn, torch.atan2(sin[1], cos[1]), float(cos[0].mean()))
