"""One segment of each row: its tokens, where documents begin and end in it, and what it hands to the next segment.

Padding may stand anywhere in a segment. On entry the tokens of each row are packed to the left and on exit put back, so
that everything between sees rows that are full up to some length: causality hides the padding behind it, positions
are plain indices, and a convolution runs straight on from the segment before.

Shapes: B rows, T tokens, P past pairs, G key/value heads, D head width, W width of the convolution, C its channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch.attention.position import INVISIBLE, causal_distances
from memorizing_transformers_pytorch.memory import ORIGIN_FIELDS, UNKNOWN
from memorizing_transformers_pytorch.memory.entries import as_int64
from memorizing_transformers_pytorch.model.config import ModelConfig


class Segment(NamedTuple):
    """Tokens (B, T) packed to the left, their origins (B, T, 3), and for padded segments the mask (B, T) of real
    tokens and the order (B, T) in which the packed ones stood. starts (B, T): real tokens that begin a document, as
    the caller knows; None if there are none."""

    tokens: Tensor
    origins: Tensor
    mask: Tensor | None
    order: Tensor | None
    starts: Tensor | None = None

    def unpack(self, packed: Tensor) -> Tensor:
        """Put (B, T, ...) back to where the tokens stood."""
        if self.order is None:
            return packed
        return torch.take_along_dim(packed, _expand(self.order.argsort(dim=-1), packed, dim=1), dim=1)


def make_segment(
    tokens: Tensor, mask: Tensor | None, origins: Tensor | None, pad_id: int | None, starts: Tensor | None = None
) -> Segment:
    """tokens (B, T), mask (B, T) bool, origins (B, T, 3), starts (B, T) bool -> a Segment.

    Without a mask, a run of pad_id at the end of a row is padding. Without origins only the token is known. Starts on
    padding are none.
    Raises ValueError for other shapes or dtypes, or an empty segment.
    """
    tokens = as_int64(tokens, "token ids")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"expected token ids (rows, at least 1), got {tuple(tokens.shape)}")
    for name, flags in (("mask", mask), ("starts", starts)):
        if flags is not None and (flags.dtype != torch.bool or flags.shape != tokens.shape):
            raise ValueError(f"expected bool {name} {tuple(tokens.shape)}, got {flags.dtype} {tuple(flags.shape)}")
    if origins is None:
        unknown = torch.full_like(tokens, UNKNOWN)
        origins = torch.stack((unknown, unknown, tokens), dim=-1)
    elif origins.shape != (*tokens.shape, ORIGIN_FIELDS):
        raise ValueError(f"expected origins {(*tokens.shape, ORIGIN_FIELDS)}, got {tuple(origins.shape)}")
    else:
        origins = as_int64(origins, "origins")
    order = None
    if mask is None:
        mask = _before_trailing(tokens, pad_id)
    elif bool(mask.all()):
        mask = None
    else:
        order = mask.logical_not().int().argsort(dim=-1, stable=True)
        tokens, origins, mask = (reorder(x, order, 1) for x in (tokens, origins, mask))
    if starts is not None:
        starts = _if_any(both(mask, reorder(starts, order, 1)))
    return Segment(tokens, origins, mask, order, starts)


def _before_trailing(tokens: Tensor, pad_id: int | None) -> Tensor | None:
    """False on the run of pad_id at the end of each row; None if there is none."""
    if pad_id is None or not bool((tokens[:, -1] == pad_id).any()):
        return None
    return (tokens != pad_id).flip(-1).cumsum(dim=-1).flip(-1) > 0


class Boundaries(NamedTuple):
    """Where documents begin and end. starts (B,), ends (B,): rows to be cleared before the search, and before
    storing; survives (B, T): tokens to be kept, those of the last document in each row. None for all.

    documents (B, T): to which document each token belongs, where some begin within the segment: 0 for the one that
    the past of the row belongs to. Tokens see their own only. None where all tokens of a row belong together.
    """

    starts: Tensor | None
    ends: Tensor | None
    survives: Tensor | None
    documents: Tensor | None = None


def find_boundaries(segment: Segment, config: ModelConfig) -> Boundaries:
    """A document begins with SOS and ends with EOS: of each row only what follows the last of either survives.

    It also begins where the caller says so (`segment.starts`), and these begin apart from what stands before.
    """
    starts = _where(segment, config.clear_memories_on_sos_token_id)
    ends = _where(segment, config.clear_memories_on_eos_token_id)
    survives = segment.mask
    if starts is not None:
        later = starts.flip(-1).cumsum(dim=-1).flip(-1) - starts.int()
        survives = both(survives, later == 0)
    if ends is not None:
        here_or_later = ends.flip(-1).cumsum(dim=-1).flip(-1)
        survives = both(survives, here_or_later == 0)
    starts, ends = (None if at is None else at.any(dim=-1) for at in (starts, ends))
    if segment.starts is None:
        return Boundaries(starts, ends, survives)
    starts = either(starts, _if_any(segment.starts[:, 0]))
    if not bool(segment.starts[:, 1:].any()):
        return Boundaries(starts, ends, survives)
    documents = segment.starts.cumsum(dim=-1)
    last = documents[:, -1:]
    return Boundaries(starts, either(ends, last.squeeze(-1) > 0), both(survives, documents == last), documents)


def _where(segment: Segment, token_id: int | None) -> Tensor | None:
    """Where (B, T) this token stands; None if nowhere."""
    return None if token_id is None else _if_any(both(segment.mask, segment.tokens == token_id))


def _if_any(at: Tensor) -> Tensor | None:
    return at if bool(at.any()) else None


def both(left: Tensor | None, right: Tensor) -> Tensor:
    """left & right, where None is True everywhere."""
    return right if left is None else left & right


def either(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """left | right, where None is False everywhere."""
    if left is None or right is None:
        return right if left is None else left
    return left | right


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

    def state_dict(self) -> dict[str, Tensor]:
        """pairs.0, ..., origins, mask (unless all are real) and conv_states.0, ..., as CPU tensors for safetensors."""
        parts = {f"pairs.{i}": pairs for i, pairs in enumerate(self)}
        parts |= {f"conv_states.{i}": conv_state for i, conv_state in enumerate(self.conv_states)}
        parts |= {"origins": self.origins} | ({} if self.mask is None else {"mask": self.mask})
        return {name: _copied(part, torch.device("cpu")) for name, part in parts.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> XLMemories:
        """What `state_dict` has said, on this device. Raises ValueError for missing or unknown names, or no origins.

        (Whether the shapes fit the model and each other is checked when it is passed to one.)
        """
        kinds, device = ("pairs", "conv_states"), torch.device(device)
        numbered = [[f"{kind}.{i}" for i in range(sum(name.startswith(kind) for name in state))] for kind in kinds]
        expected = sorted(sum(numbered, ["origins"]))
        if sorted(state.keys() - {"mask"}) != expected or state["origins"].shape[2:] != (ORIGIN_FIELDS,):
            got = {name: tuple(part.shape) for name, part in state.items()}
            raise ValueError(f"expected origins (rows, pairs, {ORIGIN_FIELDS}) among {expected}, got {got}")
        pairs, conv_states = ([_copied(state[name], device) for name in names] for names in numbered)
        mask = _copied(state["mask"], device) if "mask" in state else None
        return cls(pairs, origins=_copied(state["origins"], device), mask=mask, conv_states=conv_states)

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

    def distances(self, num_queries: int, documents: Tensor | None = None, *, with_past: bool) -> Tensor:
        """(1 or B, T, S): how far each key lies behind each query of the next segment; see `attention.position`.

        documents: (B, T), that of each token, 0 for that of the past; keys of others are invisible. None for all one.
        """
        past = self.length if with_past else 0
        distances = causal_distances(num_queries, past + num_queries, self.origins.device)
        if past > 0 and self.mask is not None:
            own = self.mask.new_ones(self.mask.shape[0], num_queries)
            distances = distances.where(torch.cat((self.mask, own), dim=1).unsqueeze(1), INVISIBLE)
        if documents is not None:
            same = F.pad(documents, (past, 0)).unsqueeze(1) == documents.unsqueeze(2)
            distances = distances.where(same, INVISIBLE)
        return distances


def _copied(x: Tensor, device: torch.device) -> Tensor:
    return x.detach().to(device, copy=True, memory_format=torch.contiguous_format)


def _put(x: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    return x.index_copy(0, rows, new.to(x))


def right_aligning(mask: Tensor) -> Tensor:
    """The order (B, n) that moves what is True to the right, keeping its sequence."""
    return mask.int().argsort(dim=-1, stable=True)


def reorder(x: Tensor, order: Tensor | None, dim: int) -> Tensor:
    """x (B, ..., n, ...) with the axis `dim` in this order (B, n); None leaves it."""
    return x if order is None else torch.take_along_dim(x, _expand(order, x, dim), dim=dim)


def _expand(order: Tensor, like: Tensor, dim: int) -> Tensor:
    """order (B, n) as an index along `dim` of a tensor whose first axis is B."""
    shape = [1] * like.ndim
    shape[0], shape[dim] = order.shape
    return order.view(shape)
