"""Remembering what a model is given, segment by segment, as in training.

Shapes: B rows, T tokens of a segment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from memorizing_transformers_pytorch.huggingface.calls import Call
from memorizing_transformers_pytorch.huggingface.contents import Contents, origins_of


class Segments:
    """In training: what the model is given in one call is remembered when it is over, after the backward pass."""

    def __init__(self, contents: Contents, skip_first: int) -> None:
        self._contents, self._skip_first = contents, skip_first
        self._call: Call | None = None
        self.is_open = False

    def before(self, call: Call) -> None:
        """Keep aside what this call does, or the same call again (gradient checkpointing)."""
        if call.cache is not None and call.cache.get_seq_length():
            raise ValueError("expected whole segments in writing(), got a call that goes on with a cache")
        self._contents.make_rows(len(call.tokens))
        self._contents.reading.staging, self._call = True, call

    @contextlib.contextmanager
    def remembered(self, titles: Sequence[str | None] | str | None) -> Iterator[None]:
        """Inside, one call of the model; at the end it is remembered, unless something was raised."""
        reading = self._contents.reading
        self.is_open, self._call = True, None
        try:
            yield
            if self._call is not None:
                self._store(self._call, titles)
        finally:
            self.is_open, reading.staging = False, False
            for site in self._contents.sites:
                site.arrived = None

    def _store(self, call: Call, titles: Sequence[str | None] | str | None) -> None:
        contents, rows = self._contents, len(call.tokens)
        numbers = _continued(contents, titles)
        places = contents.reading.offsets[:, None] + call.mask.cumsum(dim=1) - 1
        origins = origins_of(torch.tensor(numbers), places, call.tokens)
        pairs = [site.arrived for site in contents.sites]
        mask = call.mask.clone()
        mask[:, : self._skip_first] = False
        contents.store(pairs, [mask] * len(pairs), [origins] * len(pairs))
        for row in range(rows):
            contents.ledger.grow(numbers[row], int(call.mask[row].sum()))
        contents.reading.offsets = contents.reading.offsets + call.mask.sum(dim=1)


def _continued(contents: Contents, titles: Sequence[str | None] | str | None) -> list[int]:
    """The number of the document of each row: the one that is being read, or a new one with this title."""
    rows = range(contents.num_rows)
    named = [titles] * len(rows) if titles is None or isinstance(titles, str) else list(titles)
    latest = [contents.ledger.latest(row) for row in rows]
    return [
        number if number is not None else contents.ledger.begin([title], [row], [int(contents.reading.offsets[row])])[0]
        for row, title, number in zip(rows, named, latest, strict=True)
    ]
