"""After the layers: what a segment hands to the next (XL memory, the state of convolutions), and what it stores.

Shapes: B rows, T tokens, P past pairs, G key/value heads, K retrieved, D head width, W width of the convolution, C its
channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from memorizing_transformers_pytorch.attention.causal import INVISIBLE, causal_distances
from memorizing_transformers_pytorch.memory import ORIGIN_FIELDS, UNKNOWN, KNNMemoryList
from memorizing_transformers_pytorch.model.config import ModelConfig
from memorizing_transformers_pytorch.model.segment import (
    Boundaries,
    Segment,
    check_devices,
    either,
    reorder,
    right_aligning,
)


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
        """(1 or B, T, S): how far each key lies behind each query of the next segment; see `attention.causal`.

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


def check_state(config: ModelConfig, state: Sequence[Tensor] | None, initial: XLMemories) -> XLMemories:
    """XL memory and convolution states as a call of this model returned them; `initial` shows what they look like."""
    if state is None:
        return initial
    if not isinstance(state, XLMemories):
        raise ValueError(f"expected xl_memories as the preceding call returned them, got {type(state).__name__}")
    got = (len(state), len(state.conv_states))
    expected = (len(initial), len(initial.conv_states))
    if got != expected:
        raise ValueError(f"expected xl_memories of (XL layers, convolutions) {expected}, got {got}")
    if state.length > config.num_kv_pairs_kept:
        raise ValueError(f"expected at most {config.num_kv_pairs_kept} pairs in xl_memories, got {state.length}")
    check_devices(initial.origins.device, xl_memories=state.origins)
    batch = initial.origins.shape[0]
    if state.origins.shape[0] != batch:
        raise ValueError(f"expected xl_memories of {batch} rows, got {state.origins.shape[0]}")
    if state.mask is not None and (state.mask.dtype != torch.bool or state.mask.shape != state.origins.shape[:2]):
        got_mask = f"{state.mask.dtype} {tuple(state.mask.shape)}"
        raise ValueError(f"expected a bool mask {tuple(state.origins.shape[:2])} in xl_memories, got {got_mask}")
    for pairs, template in zip(state, initial, strict=True):
        shape = (*template.shape[:2], state.length, *template.shape[3:])
        if pairs.shape != shape:
            raise ValueError(f"expected pairs {shape} in xl_memories, got {tuple(pairs.shape)}")
    for conv_state, template in zip(state.conv_states, initial.conv_states, strict=True):
        if conv_state.shape != template.shape:
            raise ValueError(f"expected a state {tuple(template.shape)}, got {tuple(conv_state.shape)}")
    return state


class Written(NamedTuple):
    """What a segment leaves: the pairs of each layer (B, G, T, 2, D), the inputs of each convolution (B, T, C)."""

    pairs: list[Tensor]
    conv_inputs: list[Tensor]


def hand_over(
    config: ModelConfig,
    segment: Segment,
    boundaries: Boundaries,
    state: XLMemories,
    written: Written,
    memories: KNNMemoryList | None,
) -> XLMemories:
    """After a segment: clear rows whose document ended, store what leaves the local context, return the next state.

    Without XL memory a layer stores the pairs of the segment, with it those that XL memory discards. Everything is
    checked before the first memory changes.
    """
    ended = either(boundaries.starts, boundaries.ends)
    past = state if ended is None else state.cleared(ended)
    xl_pairs = [written.pairs[number - 1] for number in config.layers_with_xl]
    new, discarded = roll(past, xl_pairs, segment.origins, boundaries.survives, config.num_kv_pairs_kept)
    new.conv_states = [
        roll_convolution(old, inputs, boundaries.survives)
        for old, inputs in zip(past.conv_states, written.conv_inputs, strict=True)
    ]
    if memories:
        leaving = dict(zip(config.layers_with_xl, discarded.pairs, strict=True))
        staged = [
            memory.stage(leaving[number], discarded.mask, discarded.origins)
            if number in leaving
            else memory.stage(written.pairs[number - 1], boundaries.survives, segment.origins)
            for memory, number in zip(memories, config.layers_with_memory, strict=True)
        ]
        with memories.locked():
            if ended is not None:
                memories.clear_memory(torch.tensor(memories[0].scoped_indices)[ended.cpu()].tolist())
            memories.commit(staged)
    return new


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
        order = right_aligning(mask)
        mask = torch.take_along_dim(mask, order, dim=1)
    joined = [
        reorder(torch.cat((old.to(new), new.detach()), dim=2), order, 2) for old, new in zip(past, pairs, strict=True)
    ]
    origins = reorder(torch.cat((past.origins, origins), dim=1), order, 1)
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
        joined = reorder(joined * mask.unsqueeze(-1), right_aligning(mask), 1)
    return joined[:, joined.shape[1] - state.shape[1] :]
