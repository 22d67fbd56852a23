"""Remembering what a model is given, segment by segment, as in training.

Shapes: B rows, T tokens of a segment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from memorizing_transformers_pytorch.huggingface.calls import Call
from memorizing_transformers_pytorch.huggingface.contents import Contents, origins_of
from memorizing_transformers_pytorch.huggingface.texts import Titles, checked_titles


class Segments:
    """In training: what the model is given in one call is remembered when it is over, after the backward pass."""

    def __init__(self, contents: Contents, skip_first: int) -> None:
        self._contents, self._skip_first = contents, skip_first
        self._call: Call | None = None
        self._titles: Titles = None
        self.is_open = False

    def before(self, call: Call) -> None:
        """Keep aside what this call does. Raises ValueError for one that goes on with a cache, or a second one."""
        if self._call is not None or (call.cache is not None and call.cache.get_seq_length()):
            got = "another one" if self._call is not None else "one that goes on with a cache"
            raise ValueError(f"expected one call of the model with a whole segment inside writing(), got {got}")
        checked_titles(self._titles, len(call.tokens))
        self._contents.make_rows(len(call.tokens))
        self._contents.reading.staging, self._call = True, call

    @contextlib.contextmanager
    def remembered(self, titles: Titles) -> Iterator[None]:
        """Inside, one call of the model; at the end it is remembered, unless something was raised."""
        reading = self._contents.reading
        self.is_open, self._call, self._titles = True, None, titles
        try:
            yield
            if self._call is not None:
                self._store(self._call)
        finally:
            self.is_open, self._call, reading.staging = False, None, False
            for site in self._contents.sites:
                site.arrived = None

    def _store(self, call: Call) -> None:
        contents, offsets = self._contents, self._contents.reading.offsets
        numbers = self._continued()
        origins = origins_of(torch.tensor(numbers), offsets[:, None] + call.places, call.tokens)
        mask = call.mask & (call.mask.cumsum(dim=1) > self._skip_first)
        pairs = [site.arrived for site in contents.sites]
        contents.store(pairs, [mask] * len(pairs), [origins] * len(pairs))
        for number, size in zip(numbers, call.mask.sum(dim=1).tolist(), strict=True):
            contents.ledger.grow(number, size)
        contents.reading.offsets = offsets + call.next_places

    def _continued(self) -> list[int]:
        """The number of the document of each row: the one that is being read, or a new one with its title."""
        contents, numbers = self._contents, []
        for row, title in enumerate(checked_titles(self._titles, contents.num_rows)):
            latest = contents.ledger.latest(row)
            numbers.append(contents.begin_in(row, title) if latest is None else latest)
        return numbers
