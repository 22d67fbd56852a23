"""Turning queries and keys by the rotary position embeddings (Su et al. 2021) of any family.

A family hands its layers cosines and sines in a layout of its own, for a function of its own. Angles are read off those
of position 1; which number of a head the function turns against which is read off what it makes of unit vectors.

Shapes: B rows, H heads, T tokens, D head width, C numbers in a row of cosines (D, fewer where only a part is turned, or
half of them).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CosSin = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """Number d of a head becomes x[d] * cos[columns[d]] + signs[d] * x[partners[d]] * sin[columns[d]].

    partners, columns: (D,) int64. signs: (D,) float32; 0 where a number stays as it is.
    """

    partners: Tensor
    columns: Tensor
    signs: Tensor


@dataclass(frozen=True)
class Rotary:
    """How one layer turns.

    layout: which numbers. angles: (C,) float64, by which one position turns. scale: by which it also lengthens (YaRN),
    both queries and keys.
    """

    layout: Layout
    angles: Tensor
    scale: float

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, H, T, D), turned on by so many positions (B, T) or (B, 1), in float32."""
        return self.turned_as(x, self.table(positions.to(x.device)))

    def table(self, positions: Tensor) -> CosSin:
        """Cosines and sines of these positions (B, T) or (B, 1), for `turned_as`; each (B, 1, T, D)."""
        angles = (positions.double().unsqueeze(-1) * self._angles.to(positions.device)).unsqueeze(1)
        return angles.cos().float(), angles.sin().float()

    def turned_as(self, x: Tensor, table: CosSin) -> Tensor:
        """x (B, H, T, D), turned on as a table says, in float32."""
        x, (cos, sin), layout = x.float(), table, self.layout
        partners = x.index_select(-1, layout.partners.to(x.device))
        return x * cos.to(x.device) + partners * (sin * layout.signs.to(sin.device)).to(x.device)

    def unturned(self, x: Tensor, position_embeddings: CosSin) -> Tensor:
        """x (B, H, T, D) turned back to position 0, as long as the family has made it, in float32."""
        columns = self.layout.columns.to(x.device)
        cos, sin = (part.to(x.device, torch.float32)[..., columns].unsqueeze(1) for part in position_embeddings)
        if self.scale != 1.0:
            cos, sin = cos / self.scale, sin / self.scale
        if not self._turns_all:
            cos = cos.where(self.layout.signs.to(x.device) != 0, 1.0)
        return self.turned_as(x, (cos, -sin))

    def refined(self, position_embeddings: CosSin, place: int) -> Rotary:
        """With angles as precise as this later place shows them, half precision being too coarse at the first."""
        cos, sin = (part[0, -1].double() for part in position_embeddings)
        error = torch.atan2(sin, cos) - place * self.angles
        return replace(self, angles=self.angles + torch.atan2(error.sin(), error.cos()) / place)

    @cached_property
    def _angles(self) -> Tensor:
        """(D,) float64: of each number of a head, 0 for what stays as it is."""
        with torch.inference_mode(False):  # it outlives this call
            return self.angles[self.layout.columns] * (self.layout.signs != 0)

    @cached_property
    def _turns_all(self) -> bool:
        return bool((self.layout.signs != 0).all())


def rotary_of(attention: nn.Module, position_embeddings: object, width: int) -> Rotary | None:
    """How this layer turns heads of this width, read off the cosines and sines (B, T, C) of positions 0 and 1; None if
    it does not so."""
    turn = _turn_of(sys.modules[type(attention).__module__])
    if turn is None or not isinstance(position_embeddings, tuple) or len(position_embeddings) != 2:
        return None
    if not all(isinstance(part, Tensor) and part.ndim == 3 and not part.is_complex() for part in position_embeddings):
        return None
    cos, sin = (part[0, :2].detach().double() for part in position_embeddings)
    layout = layout_of(turn, width, cos.shape[-1], cos.device)
    return None if layout is None else Rotary(layout, torch.atan2(sin[1], cos[1]), float(cos[0].mean()))


def _turn_of(family: Any) -> Turn | None:
    """The function of a family that turns queries and keys; None if it has none, or one with other arguments."""
    function = getattr(family, "apply_rotary_pos_emb", None)
    if function is None:
        return None
    names = list(inspect.signature(function).parameters)
    if names[:3] == ["x", "cos", "sin"]:  # Gemma 3n and later turn one tensor at a time
        return lambda q, k, cos, sin: (function(q, cos, sin), function(k, cos, sin))
    return function if names[:4] == ["q", "k", "cos", "sin"] else None


def layout_of(turn: Turn, width: int, columns: int, device: torch.device) -> Layout | None:
    """What a function turns into what, found by trying it on unit vectors; None if it does anything else."""
    none, one = torch.zeros(columns, device=device), torch.ones(columns, device=device)
    numbers = torch.arange(1.0, columns + 1, device=device)
    kept = _of_units(turn, width, none, none)  # by column what a number of a head is made of, by row of which one
    by_cos, by_sin = _of_units(turn, width, numbers, none) - kept, _of_units(turn, width, none, numbers) - kept
    partners, signs = by_sin.abs().argmax(dim=0), (_of_units(turn, width, none, one) - kept).sum(dim=0)
    found = by_cos.diagonal()
    layout = Layout(partners, (found - 1).clamp_min(0).long(), signs)
    expected = torch.zeros_like(by_sin).scatter_(0, partners[None], (signs * found)[None])
    is_so = torch.equal(by_cos, found.diag()) and torch.equal(by_sin, expected)
    return layout if is_so and torch.equal(signs.abs(), (found > 0).float()) else None


def _of_units(turn: Turn, width: int, cos: Tensor, sin: Tensor) -> Tensor:
    """(D, D): what becomes of each unit vector under the same cosines and sines (C,).

    Where a layer turns only a part of each head, its function is given that part, or takes it by itself.
    """
    units, part = torch.eye(width, device=cos.device)[None, None], cos.shape[-1]
    rows = [each.expand(1, width, -1) for each in (cos, sin)]
    try:
        return turn(units, units, rows[0], rows[1])[0][0, 0]
    except RuntimeError:
        some = units[..., :part]
        return torch.cat((turn(some, some, rows[0], rows[1])[0], units[..., part:]), dim=-1)[0, 0]
