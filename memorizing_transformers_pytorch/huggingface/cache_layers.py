"""Layers of a cache of transformers that begin with passages, and what they share.

During a call of the model the cache is as long as it is; before and after, its length is that of the text alone.

Shapes: B rows, G key/value heads, P positions of passages, S positions of the text in the cache, T tokens of a call,
D head width, Q tokens by which passages are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

Turn = Callable[[Tensor], Tensor]


class Prefix:
    """What the layers of one cache share.

    size: P. mask: (B, P) bool, False for padding, which is on the left. starts: (B,), the position at which the text of
    each row begins. is_full: whether no row has padding. tokens: (B, at most Q), the last tokens of the text. passed:
    how many tokens of the text came since passages were chosen. is_due: whether the next call chooses passages anew.
    dropped: how many tokens of the text have left the cache. gone: (B,), how many positions those took. has_text:
    whether the cache holds any of the text. is_visible: whether a call is running, which sees the passages.
    """

    def __init__(self, mask: Tensor) -> None:
        self.begin(mask)

    def begin(self, mask: Tensor) -> None:
        """Start again, before the first token of a text."""
        self.dropped, self.is_visible, self.has_text = 0, False, False
        self.gone = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
        self.tokens: Tensor | None = None
        self.exchange(mask, mask.sum(dim=1))

    def exchange(self, mask: Tensor, starts: Tensor) -> None:
        """Note new passages. mask: (B, P), False for padding. starts: (B,), where the text of each row begins."""
        self.mask, self.starts, self.is_full, self.passed, self.is_due = mask, starts, bool(mask.all()), 0, False

    @property
    def size(self) -> int:
        return self.mask.shape[1]

    @property
    def shift(self) -> int:
        """What the length of the cache differs from that of the text."""
        return 0 if self.is_visible else self.size - self.dropped

    def note(self, tokens: Tensor, most: int) -> None:
        """Tokens (B, T) of the text have passed; the last ones are kept."""
        tokens = tokens.to(self.mask.device)
        self.tokens = (tokens if self.tokens is None else torch.cat((self.tokens, tokens), dim=1))[:, -most:]
        self.passed, self.has_text = self.passed + tokens.shape[1], True

    def take(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        rows = rows.to(self.mask.device)
        self.mask, self.starts, self.gone = self.mask[rows], self.starts[rows], self.gone[rows]
        self.tokens = None if self.tokens is None else self.tokens[rows]

    def drop_last(self, count: int) -> None:
        """So many tokens of the text were taken back."""
        self.passed = max(self.passed - count, 0)
        self.tokens = None if self.tokens is None else self.tokens[:, : max(self.tokens.shape[1] - count, 0)]


class DynamicWithPassages(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a growing cache. It keeps all of the text, also where the layer attends to a window of it: the masks
    of the model hide what lies before that. leads: whether it tells the prefix of changes: the first layer does."""

    keys: Any
    values: Any

    def __init__(self, prefix: Prefix, leads: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix, self._leads = prefix, leads

    def get_seq_length(self) -> int:
        length: int = super().get_seq_length()
        return max(length - self.prefix.shift, 0) if length else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None:
            self.keys, self.values = self.keys[indices.to(self.keys.device)], self.values[indices.to(self.keys.device)]
        if self._leads:
            self.prefix.take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = len(self.prefix.mask if self.keys is None else self.keys)  # the first layer has told the prefix already
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length()
        gone = min(-tokens_to_remove, length) if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        if gone:
            self.keys, self.values = self.keys[:, :, :-gone], self.values[:, :, :-gone]
        if self._leads:
            self.prefix.drop_last(gone)

    def put(self, keys: Tensor, values: Tensor, turn: Turn | None) -> None:
        """Exchange the passages for others, turning the keys of the text."""
        if not self.is_initialized:
            if keys.numel():
                self.update(keys, values)
            return
        own_keys, own_values = (part[:, :, self.prefix.size :] for part in (self.keys, self.values))
        own_keys = own_keys if turn is None else turn(own_keys)
        self.keys = torch.cat((keys, own_keys), dim=2) if keys.numel() else own_keys
        self.values = torch.cat((values, own_values), dim=2) if values.numel() else own_values


class StaticWithPassages(StaticLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache of a fixed size, in which passages take the first positions."""

    keys: Any
    values: Any

    def __init__(self, prefix: Prefix, most: int) -> None:
        super().__init__(most + prefix.size)
        self.prefix = prefix

    def get_seq_length(self) -> Any:
        length = super().get_seq_length()
        return length - self.prefix.shift if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len - self.prefix.shift, 0

    def put(self, keys: Tensor, values: Tensor, turn: Turn | None) -> None:
        """Exchange the passages for others, where they lie, turning the keys of the text."""
        size = self.prefix.size
        padding = (0, 0, size - keys.shape[2], 0)
        keys, values = F.pad(keys, padding), F.pad(values, padding)
        if not self.is_initialized or self.cumulative_length == 0:
            self.update(keys, values)
            return
        self.keys[:, :, :size], self.values[:, :, :size] = keys, values
        if turn is not None:
            self.keys[:, :, size:] = turn(self.keys[:, :, size:])
