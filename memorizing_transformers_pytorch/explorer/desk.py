"""A model with a memory of one's own: reading, continuing and explaining, for models of both kinds.

Asking changes nothing that is remembered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memorizing_transformers_pytorch.explorer.explain import explain
from memorizing_transformers_pytorch.explorer.explanation import Explanation
from memorizing_transformers_pytorch.library.readers import DocumentReader, HubReader, RunReader
from memorizing_transformers_pytorch.model.generation import sample
from memorizing_transformers_pytorch.model.session import Session

PASSAGE = 32  # tokens of a source that are shown together
MANY = 2_048  # tokens of a prompt and what follows, for models of transformers that take more


@dataclass(frozen=True)
class Sampling:
    """new_tokens: to write. temperature: 0 takes the likeliest token. seed: the same writes the same."""

    new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"expected at least 1 token and a temperature of at least 0, got {self.new_tokens}, {self.temperature}"
            )


class Desk(ABC):
    """answer: what was explained last."""

    reader: DocumentReader
    answer: Explanation | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the model has this memory. One desk at a time."""
        yield

    @property
    @abstractmethod
    def longest(self) -> int:
        """How many tokens a prompt and what follows can have."""

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str: ...

    @abstractmethod
    def continued(self, prompt: list[int], sampling: Sampling, *, with_memory: bool) -> list[int]:
        """The tokens that follow."""

    @abstractmethod
    def explained(self, tokens: list[int], *, measure: bool) -> Explanation:
        """What is looked up for tokens. measure: also what passages are worth."""


class RunDesk(Desk):
    """The model of a run is shared, each desk has memories of its own; those of a folder are mapped."""

    def __init__(self, shared: RunReader, folder: Path | None) -> None:
        self._run = shared.run
        self.reader = self._own = RunReader(shared.run, None)
        if folder is not None:
            self._own.load(folder, mmap=True)

    @property
    def longest(self) -> int:
        return self._own.longest

    def encode(self, text: str) -> list[int]:
        return self._run.tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._run.tokenizer.decode(tokens)

    def continued(self, prompt: list[int], sampling: Sampling, *, with_memory: bool) -> list[int]:
        # A session stores what it has read when a segment is full, or it is closed: here neither happens.
        session = Session(
            self._run.model,
            self._own.memory if with_memory else None,
            batch_size=1,
            segment_length=self.longest,
        )
        source, new, pending = torch.Generator().manual_seed(sampling.seed), list[int](), prompt
        for _ in range(sampling.new_tokens):
            pending = sample(session.read([pending]), sampling.temperature, None, None, source).tolist()
            new += pending
        return new

    def explained(self, tokens: list[int], *, measure: bool) -> Explanation:
        return _explained(self._run.model, tokens, self._own.memory, self._run.tokenizer, measure)


class HubDesk(Desk):
    """A model of transformers has one memory, which desks take turns to fill."""

    def __init__(self, shared: HubReader, folder: Path | None) -> None:
        self.reader, self._memory, self._tokenizer = shared, shared.memory, shared.tokenizer
        self._kept: Any = None
        if folder is not None:
            with self.at_work():
                self._memory.load(folder, mmap=True)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        others = self._memory.exchange(self._kept)
        try:
            yield
        finally:
            self._kept = self._memory.exchange(others)

    @property
    def longest(self) -> int:
        return min(self.reader.longest or MANY, MANY)

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, verbose=False).input_ids]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    def continued(self, prompt: list[int], sampling: Sampling, *, with_memory: bool) -> list[int]:
        model = self._memory.model
        tokens = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
        source, new, cache = torch.Generator().manual_seed(sampling.seed), list[int](), None
        with torch.no_grad(), self._memory.read_only(), self._memory.enabled(with_memory):
            for _ in range(sampling.new_tokens):
                result = model(input_ids=tokens, past_key_values=cache, use_cache=True)
                cache, tokens = (
                    result.past_key_values,
                    sample(result.logits[:, -1], sampling.temperature, None, None, source)[:, None],
                )
                new.append(int(tokens))
        return new

    def explained(self, tokens: list[int], *, measure: bool) -> Explanation:
        return _explained(self._memory.model, tokens, self._memory, self._tokenizer, measure)


def _explained(model: Any, tokens: list[int], memories: Any, tokenizer: Any, measure: bool) -> Explanation:
    contribution = "ablate" if measure else None
    return explain(model, tokens, memories, tokenizer=tokenizer, contribution=contribution, passage=PASSAGE)
