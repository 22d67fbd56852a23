"""Finding passages by their words: BM25 (Robertson and Zaragoza 2009), by the library bm25s.

Shapes: N entries of a row in the order in which they were read, T tokens of a question.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory.store import Store

WIDTH = 80  # entries of a passage that is scored
STEP = 40


class WordIndex:
    """Scores the passages of a row by the words of a question; indexed when it is first asked, and after changes.

    tokenizer: whose tokens they are, to compare words; without one, tokens are compared.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer
        self._indices: dict[int, tuple[Any, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_tokenizer": self._tokenizer, "_indices": {}}

    def scores(self, store: Store, row: int, question: Tensor, origins: Tensor, starts: Tensor) -> Tensor:
        """Origins (N, 3) of the entries of a row and where their documents start -> (N,) the score of the passage in
        whose middle each entry lies, a little less for those beside the middle."""
        state = store.lives[row], store.written_to[row], len(origins)
        if row not in self._indices or self._indices[row][0] != state:
            self._indices[row] = state, self._index(origins, starts)
        passage, share, index = self._indices[row][1]
        words = self._words([question.tolist()])[0]
        if not words:
            return torch.zeros(len(origins))
        scores: Tensor = torch.from_numpy(index.get_scores(words)).float()[passage] * share
        return scores

    def _index(self, origins: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Of each entry the number of its passage (N,), and what share of its score it gets (N,); and the index."""
        import bm25s

        tokens, passages, numbers, shares = origins[:, 2].tolist(), list[list[int]](), list[Tensor](), list[Tensor]()
        borders = [*torch.unique(starts).tolist(), len(tokens)]
        for begin, end in itertools.pairwise(borders):
            begins = range(begin, max(end - STEP, begin + 1), STEP)
            places = torch.arange(begin, end)
            number = ((places - begin - WIDTH // 2 + STEP // 2) // STEP).clamp(0, len(begins) - 1)
            middle = (begin + number * STEP + WIDTH // 2).clamp(max=end - 1)
            numbers.append(number + len(passages))
            shares.append(1 - (places - middle).abs() / (10 * WIDTH))
            passages += [tokens[start : min(start + WIDTH, end)] for start in begins]
        index = bm25s.BM25()
        index.index(self._words(passages), show_progress=False)
        return torch.cat(numbers), torch.cat(shares), index

    def _words(self, passages: list[list[int]]) -> list[list[str]]:
        """What is compared."""
        if self._tokenizer is None:
            return [[str(token) for token in passage] for passage in passages]
        import bm25s

        texts = self._tokenizer.batch_decode(passages, skip_special_tokens=True)
        words: list[list[str]] = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
        return words
