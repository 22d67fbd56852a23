"""Texts as a memory reads them: checked, without padding, piece by piece.

Shapes: R rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Tokens start ... stop - 1 of the text in a row, of which the last `new` were in no piece before."""

    row: int
    start: int
    stop: int
    new: int


Titles = str | Sequence[str] | None
"""Of all documents, of each, or of none."""


def checked_titles(titles: Titles, rows: int) -> list[str | None]:
    """A title for each of the documents. Raises ValueError for another number."""
    if titles is None or isinstance(titles, str):
        return [titles] * rows
    if not isinstance(titles, Sequence) or not all(title is None or isinstance(title, str) for title in titles):
        raise ValueError(f"expected titles as text, got {titles!r}")
    if len(titles) != rows:
        raise ValueError(f"expected a title for each of {rows} documents, got {len(titles)}")
    return list(titles)


def checked_texts(input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int) -> list[Tensor]:
    """input_ids (N,) or (R, N) and their mask -> the tokens of each row. Raises ValueError for what cannot be read."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim not in (1, 2) or input_ids.is_floating_point():
        got = f"{input_ids.dtype} {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else repr(type(input_ids))
        raise ValueError(f"expected input_ids as integers (N,) or (rows, N), got {got}")
    if input_ids.numel() == 0:
        raise ValueError(
            f"expected at least one token in each document, got input_ids of shape {tuple(input_ids.shape)}"
        )
    if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:
        given = str(tuple(attention_mask.shape)) if isinstance(attention_mask, Tensor) else repr(type(attention_mask))
        raise ValueError(f"expected an attention_mask of shape {tuple(input_ids.shape)}, got {given}")
    rows = input_ids.cpu().reshape(-1, input_ids.shape[-1])
    mask = torch.ones_like(rows) if attention_mask is None else attention_mask.cpu().reshape(rows.shape)
    texts = [row[kept] for row, kept in zip(rows, mask.bool(), strict=True)]
    for row, text in enumerate(texts):
        if len(text) == 0:
            raise ValueError(f"expected at least one token in each document, got none in row {row}")
        if int(text.min()) < 0 or int(text.max()) >= vocabulary:
            found = f"{int(text.min())} to {int(text.max())}"
            raise ValueError(f"expected token ids of the model, 0 to {vocabulary - 1}, got {found} in row {row}")
    return texts


def stops_of(length: int, size: int, overlap: int, pieces: int) -> list[int]:
    """Where to stop reading a text of this length for a while, every so many pieces; the last is its end."""
    step = pieces * (size - overlap)
    return [*range(step + overlap, length, step), length]


def pieces_of(lengths: list[int], size: int, overlap: int, read: int = 0) -> Iterator[list[Piece]]:
    """The texts of these lengths side by side, so many tokens at a time, each piece beginning with the last ones of the
    piece before; texts that have ended are left out, and pieces of which all was read."""
    for start in range(0, max(lengths), size - overlap):
        known = overlap if start else 0  # tokens that the piece before had
        pieces = [
            Piece(row, start, min(start + size, length), min(start + size, length) - start - known)
            for row, length in enumerate(lengths)
            if start + known < length
        ]
        if pieces and start + size > read:
            yield pieces
