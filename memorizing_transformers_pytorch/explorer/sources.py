"""The text that a memory holds: what stands around an entry, from the tokens that entries know themselves.

Nothing but the memory is needed, and what was forgotten or never stored is a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from memorizing_transformers_pytorch.memory import KNNMemory

GAP = " \N{HORIZONTAL ELLIPSIS} "
LONGEST_CHARACTER = 4  # in bytes, and so in tokens
Decode = Callable[[Sequence[int]], str]


def is_known(document: Any, place: Any) -> Any:
    """Whether an entry, or each of several, says where it stands. Those that do not may be of any number of texts, all
    of which count from 0: they have no neighbours."""
    return (document >= 0) & (place >= 0)


class Sources:
    """The tokens of the documents in a row, by document and place, as they are when this is made."""

    def __init__(self, memories: Iterable[KNNMemory], row: int, decode: Decode | None) -> None:
        self._decode = decode
        self._tokens: dict[int, dict[int, int]] = {}
        for memory in memories:
            origins = memory.store.origins[row, : memory.store.filled[row]]
            for document, place, token in origins.cpu().tolist():
                if is_known(document, place):
                    self._tokens.setdefault(document, {})[place] = token

    def add(self, document: int, place: int, tokens: Sequence[int]) -> None:
        """Note tokens of a document from a place on."""
        self._tokens.setdefault(document, {}).update(enumerate(tokens, place))

    def tokens(self, document: int, first: int, last: int) -> list[int] | None:
        """Those from place `first` on, to the end of the document or to `last` (included); None if any is missing."""
        known = self._tokens.get(document, {})
        end = max((place for place in range(first, last + 1) if place in known), default=first - 1)
        found = [known.get(place, -1) for place in range(first, end + 1)]
        return found if found and min(found) >= 0 else None

    def text(self, document: int, first: int, last: int) -> str:
        """What stands from place `first` to `last` (included), with an ellipsis where something is missing."""
        known = self._tokens.get(document, {})
        runs: list[list[int]] = [[]]
        for place in range(first, last + 1):
            token = known.get(place)
            if token is not None and token >= 0:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        return GAP.join(self.decoded(run) for run in runs if run)

    def alone(self, token: int) -> str:
        """What is remembered of an unknown place: no more than its own token, if that."""
        return self.decoded([token]) if token >= 0 else ""

    def decoded(self, tokens: Sequence[int]) -> str:
        """Tokens as text; without a tokenizer as numbers."""
        return " ".join(map(str, tokens)) if self._decode is None else self._decode(tokens)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to the text of those before it: alone, some tokenizers write it without its space.

        A character that several tokens write is with the last of them; the others add nothing.
        """
        if self._decode is None:
            return list(map(str, tokens))
        found, known, written = list[str](), 0, 0  # tokens `known` to `written` are decoded again, as context
        for end in range(1, len(tokens) + 1):
            before, text = self.decoded(tokens[known:written]), self.decoded(tokens[known:end])
            if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens) and end - written < LONGEST_CHARACTER:
                found.append("")
            else:
                found.append(text[len(before) :])
                known, written = written, end
        return found


def decoder(tokenizer: object) -> Decode | None:
    """The `decode` of a tokenizer, ours or one of transformers. Raises ValueError for an object without it."""
    if tokenizer is None:
        return None
    decode = getattr(tokenizer, "decode", None)
    if decode is None:
        raise ValueError(f"expected a tokenizer with decode(), got {type(tokenizer).__name__}")

    return lambda tokens: str(decode([int(token) for token in tokens]))


def encoded(text: object, tokenizer: object, vocabulary: int) -> torch.Tensor:
    """Token ids (T,) of a text, or the given ones. Raises ValueError for anything else, for no token, and for several
    texts."""
    if isinstance(text, str):
        encode = getattr(tokenizer, "encode", None)
        if encode is None:
            raise ValueError("expected a tokenizer with encode(), to explain a text, got none")
        text = encode(text)
    tokens = torch.as_tensor(text)
    if tokens.ndim > 1 and tokens.numel() != tokens.shape[-1]:
        raise ValueError(f"expected tokens (T,) or (1, T) of one text, got {tuple(tokens.shape)}")
    tokens = tokens.flatten()
    if tokens.is_floating_point() or tokens.numel() == 0:
        raise ValueError(f"expected at least one token as integers, got {tokens.dtype} {tuple(tokens.shape)}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(f"expected tokens from 0 to {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}")
    return tokens.long().cpu()
