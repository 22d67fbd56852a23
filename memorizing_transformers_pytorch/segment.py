"""One segment of each row: its tokens, where documents begin and end in it, and what it hands to the next segment.

Padding may stand anywhere in a segment. On entry the tokens of each row are packed to the left and on exit put back, so
that everything between sees rows that are full up to some length: causality hides the padding behind it, positions
are plain indices, and a convolution runs straight on from the segment before.

Shapes: B rows, T tokens, P past pairs, G key/value heads, D head width, W width of the convolution, C its channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch.config import ModelConfig
from memorizing_transformers_pytorch.memory import ORIGIN_FIELDS, UNKNOWN
from memorizing_transformers_pytorch.nn.position import INVISIBLE, causal_distances


class Segment(NamedTuple):
    """Tokens (B, T) packed to the left, their origins (B, T, 3), and for padded segments the mask (B, T) of real
    tokens and the order (B, T) in which the packed ones stood."""

    tokens: Tensor
    origins: Tensor
    mask: Tensor | None
    order: Tensor | None

    def unpack(self, packed: Tensor) -> Tensor:
        """Put (B, T, ...) back to where the tokens stood."""
        if self.order is None:
            return packed
        return torch.take_along_dim(packed, _expand(self.order.argsort(dim=-1), packed, dim=1), dim=1)


def make_segment(tokens: Tensor, mask: Tensor | None, origins: Tensor | None, pad_id: int | None) -> Segment:
    """tokens (B, T), mask (B, T) bool, origins (B, T, 3) -> a Segment.

    Without a mask, a run of pad_id at the end of a row is padding. Without origins only the token is known.
    Raises ValueError for other shapes or dtypes, or an empty segment.
    """
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.is_floating_point():
        raise ValueError(f"expected integer tokens (rows, at least 1), got {tokens.dtype} {tuple(tokens.shape)}")
    tokens = tokens.long()
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens.shape):
        raise ValueError(f"expected a bool mask {tuple(tokens.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    if origins is None:
        unknown = torch.full_like(tokens, UNKNOWN)
        origins = torch.stack((unknown, unknown, tokens), dim=-1)
    elif origins.is_floating_point() or origins.shape != (*tokens.shape, ORIGIN_FIELDS):
        expected = f"integer origins {(*tokens.shape, ORIGIN_FIELDS)}"
        raise ValueError(f"expected {expected}, got {origins.dtype} {tuple(origins.shape)}")
    if mask is None:
        return Segment(tokens, origins, _before_trailing(tokens, pad_id), None)
    if bool(mask.all()):
        return Segment(tokens, origins, None, None)
    order = mask.logical_not().int().argsort(dim=-1, stable=True)
    return Segment(_reorder(tokens, order, 1), _reorder(origins, order, 1), _reorder(mask, order, 1), order)


def _before_trailing(tokens: Tensor, pad_id: int | None) -> Tensor | None:
    """False on the run of pad_id at the end of each row; None if there is none."""
    if pad_id is None or not bool((tokens[:, -1] == pad_id).any()):
        return None
    return (tokens != pad_id).flip(-1).cumsum(dim=-1).flip(-1) > 0


class Boundaries(NamedTuple):
    """Where documents begin and end. starts (B,), ends (B,): rows to be cleared before the search, and before
    storing; survives (B, T): tokens to be kept, those of the last document in each row. None for all."""

    starts: Tensor | None
    ends: Tensor | None
    survives: Tensor | None


def find_boundaries(segment: Segment, config: ModelConfig) -> Boundaries:
    """A document begins with SOS and ends with EOS: of each row only what follows the last of either survives."""
    starts = _where(segment, config.clear_memories_on_sos_token_id)
    ends = _where(segment, config.clear_memories_on_eos_token_id)
    survives = segment.mask
    if starts is not None:
        later = starts.flip(-1).cumsum(dim=-1).flip(-1) - starts.int()
        survives = _both(survives, later == 0)
    if ends is not None:
        here_or_later = ends.flip(-1).cumsum(dim=-1).flip(-1)
        survives = _both(survives, here_or_later == 0)
    starts, ends = (None if at is None else at.any(dim=-1) for at in (starts, ends))
    return Boundaries(starts, ends, survives)


def _where(segment: Segment, token_id: int | None) -> Tensor | None:
    """Where (B, T) this token stands; None if nowhere."""
    if token_id is None:
        return None
    at = segment.tokens == token_id
    if segment.mask is not None:
        at = at & segment.mask
    return at if bool(at.any()) else None


def _both(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left & right


class XLMemories(Sequence[Tensor]):
    """What a segment hands to the next: Transformer-XL memory, and the state of the short convolutions.

    A sequence of the pairs (B, G, P, 2, D) of each layer with XL memory, oldest first, and besides
    mask: (B, P) bool, False where a row has no pair (always to the left of those that it has); None if it has all.
    origins: (B, P, 3) int64, where the pairs come from.
    conv_states: for each memorizing layer with a convolution, its last W - 1 inputs (B, W - 1, C).
    """

    def __init__(
        self, pairs: Iterable[Tensor], *, origins: Tensor, mask: Tensor | None, conv_states: Sequence[Tensor] = ()
    ) -> None:
        self._pairs = list(pairs)
        self.origins = origins
        self.mask = mask
        self.conv_states = list(conv_states)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return self._pairs[index]

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def length(self) -> int:
        """P, the pairs that each layer holds of each row (some of them masked)."""
        return self.origins.shape[1]

    def cleared(self, rows: Tensor | Iterable[int]) -> XLMemories:
        """The same for all rows but these, which start anew. rows: (B,) bool, or row numbers."""
        batch = self.origins.shape[0]
        if isinstance(rows, Tensor) and rows.dtype == torch.bool:
            if rows.shape != (batch,):
                raise ValueError(f"expected a bool for each of {batch} rows, got {tuple(rows.shape)}")
        else:
            numbers = rows.tolist() if isinstance(rows, Tensor) else list(rows)
            if not all(row in range(batch) for row in numbers):
                raise ValueError(f"expected rows from 0 to {batch - 1}, got {numbers}")
            if not numbers:
                return self
            rows = torch.tensor([row in numbers for row in range(batch)], device=self.origins.device)
        keep = ~rows
        mask = self._full_mask() & keep[:, None]
        conv_states = [state * keep[:, None, None] for state in self.conv_states]
        return XLMemories(self, origins=self.origins, mask=mask, conv_states=conv_states)

    def taken(self, rows: Tensor) -> XLMemories:
        """The state of these rows only. rows: (n,) row numbers."""
        mask = None if self.mask is None else self.mask[rows]
        conv_states = [state[rows] for state in self.conv_states]
        return XLMemories(
            [pairs[rows] for pairs in self], origins=self.origins[rows], mask=mask, conv_states=conv_states
        )

    def replaced(self, rows: Tensor, state: XLMemories) -> XLMemories:
        """The same, with these rows (n,) as in `state` (of n rows)."""
        length = max(self.length, state.length)
        old, new = self._padded(length), state._padded(length)
        return XLMemories(
            [_put(pairs, rows, put) for pairs, put in zip(old, new, strict=True)],
            origins=_put(old.origins, rows, new.origins),
            mask=_put(old._full_mask(), rows, new._full_mask()),
            conv_states=[_put(a, rows, b) for a, b in zip(self.conv_states, state.conv_states, strict=True)],
        )

    def _full_mask(self) -> Tensor:
        return torch.ones_like(self.origins[..., 0], dtype=torch.bool) if self.mask is None else self.mask

    def _padded(self, length: int) -> XLMemories:
        """The same with `length` pairs, of which the first are none."""
        missing = length - self.length
        if missing == 0:
            return self
        return XLMemories(
            [F.pad(pairs, (0, 0, 0, 0, missing, 0)) for pairs in self],
            origins=F.pad(self.origins, (0, 0, missing, 0), value=UNKNOWN),
            mask=F.pad(self._full_mask(), (missing, 0), value=False),
            conv_states=self.conv_states,
        )

    def distances(self, num_queries: int, *, with_past: bool) -> Tensor:
        """(1 or B, T, S): how far each key lies behind each query of the next segment; see `nn.position`."""
        past = self.length if with_past else 0
        distances = causal_distances(num_queries, past + num_queries, self.origins.device)
        if past == 0 or self.mask is None:
            return distances
        own = self.mask.new_ones(self.mask.shape[0], num_queries)
        return distances.where(torch.cat((self.mask, own), dim=1).unsqueeze(1), INVISIBLE)


class Discarded(NamedTuple):
    """What XL memory no longer holds: pairs of each layer (B, G, n, 2, D), which are real (B, n), origins (B, n, 3)."""

    pairs: list[Tensor]
    mask: Tensor | None
    origins: Tensor


def roll(
    past: XLMemories, pairs: Sequence[Tensor], origins: Tensor, survives: Tensor | None, capacity: int
) -> tuple[XLMemories, Discarded]:
    """Append the surviving pairs of a segment (B, G, T, 2, D) to those of the past; keep the last `capacity` of a row.

    The state of the convolutions is not touched.
    """
    order = mask = None
    if past.mask is not None or survives is not None:
        batch, length = origins.shape[:2]
        ones = origins.new_ones(batch, past.length + length, dtype=torch.bool)
        held = ones[:, : past.length] if past.mask is None else past.mask
        mask = torch.cat((held, ones[:, past.length :] if survives is None else survives), dim=1)
        order = _right_aligning(mask)
        mask = torch.take_along_dim(mask, order, dim=1)
    joined = [
        _reorder(torch.cat((old.to(new), new.detach()), dim=2), order, 2) for old, new in zip(past, pairs, strict=True)
    ]
    origins = _reorder(torch.cat((past.origins, origins), dim=1), order, 1)
    kept = min(capacity, origins.shape[1])
    cut = origins.shape[1] - kept
    kept_mask, lost_mask = (None, None) if mask is None else (mask[:, cut:], mask[:, :cut])
    state = XLMemories(
        [x[:, :, cut:] for x in joined],
        origins=origins[:, cut:],
        mask=None if kept_mask is None or bool(kept_mask.all()) else kept_mask,
        conv_states=past.conv_states,
    )
    return state, Discarded([x[:, :, :cut] for x in joined], lost_mask, origins[:, :cut])


def roll_convolution(state: Tensor, inputs: Tensor, survives: Tensor | None) -> Tensor:
    """The last W - 1 inputs of a convolution: state (B, W - 1, C), inputs (B, T, C) -> (B, W - 1, C), 0 where none."""
    joined = torch.cat((state.to(inputs), inputs.detach()), dim=1)
    if survives is not None:
        mask = torch.cat((survives.new_ones(state.shape[:2]), survives), dim=1)
        joined = _reorder(joined * mask.unsqueeze(-1), _right_aligning(mask), 1)
    return joined[:, joined.shape[1] - state.shape[1] :]


def _put(x: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return x.index_copy(0, rows, new.to(x))


def _right_aligning(mask: Tensor) -> Tensor:
    """The order (B, n) that moves what is True to the right, keeping its sequence."""
    return mask.int().argsort(dim=-1, stable=True)


def _reorder(x: Tensor, order: Tensor | None, dim: int) -> Tensor:
    return x if order is None else torch.take_along_dim(x, _expand(order, x, dim), dim=dim)


def _expand(order: Tensor, like: Tensor, dim: int) -> Tensor:
    """order (B, n) as an index along `dim` of a tensor whose first axis is B."""
    shape = [1] * like.ndim
    shape[0], shape[dim] = order.shape
    return order.view(shape)
