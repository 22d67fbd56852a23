"""A model and a memory of one's own: continuing and explaining a text, for models of both kinds.

Asking changes nothing that is remembered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from memorizing_transformers_pytorch.explorer.explain import explain
from memorizing_transformers_pytorch.explorer.explanation import Explanation
from memorizing_transformers_pytorch.library.readers import DocumentReader, HubReader, RunReader
from memorizing_transformers_pytorch.model.generation import sample
from memorizing_transformers_pytorch.model.session import Session

PASSAGE = 32  # tokens of a source that are shown together
MANY = 2_048  # tokens of a prompt and its continuation, for models of transformers that take more


@dataclass(frozen=True)
class Sampling:
    """new_tokens: how many to write. temperature: 0 takes the likeliest token. seed: the same seed writes the same."""

    new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"expected at least 1 token and a temperature of at least 0, got {self.new_tokens}, {self.temperature}"
            )


class Workspace:
    """Workspaces share a model. Those of a run have memories of their own (a folder is mapped); a model of transformers
    has one memory, which holds the contents of one workspace at a time.

    answer: what was explained last.
    """

    def __init__(self, shared: DocumentReader, folder: Path | None) -> None:
        self.reader = RunReader(shared.run, None) if isinstance(shared, RunReader) else shared
        self.answer: Explanation | None = None
        self._contents: Any = None  # of the memory of a model of transformers, while others use it
        if folder is not None:
            with self.active():
                self.reader.load(folder, mmap=True)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the model has this memory. One workspace at a time."""
        if not isinstance(self.reader, HubReader):
            yield
            return
        memory = self.reader.memory
        others = memory.exchange(self._contents)
        try:
            yield
        finally:
            self._contents = memory.exchange(others)

    @property
    def longest(self) -> int:
        """How many tokens a prompt and its continuation can have."""
        longest = self.reader.longest or MANY
        if isinstance(self.reader, HubReader) and self.reader.is_of_spans:
            longest = max(longest - self.reader.memory.options.budget, 1)
        return min(longest, MANY) if isinstance(self.reader, HubReader) else longest

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.reader.tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.reader.tokenizer.decode(list(tokens)))

    def asked(self, question: str, *, with_memory: bool) -> Any:
        """What a model that has a memory of passages is given when it is asked; see `RecallMemory.asked`."""
        memory: Any = self.reader.memory
        with memory.enabled(with_memory):
            return memory.asked(question)

    def continued(self, prompt: list[int], sampling: Sampling, *, with_memory: bool) -> list[int]:
        """The tokens that follow."""
        source, reader = torch.Generator().manual_seed(sampling.seed), self.reader
        if isinstance(reader, HubReader):
            memory: Any = reader.memory
            with memory.read_only(), memory.enabled(with_memory):
                return list(islice(reader.written(prompt, sampling.temperature, generator=source), sampling.new_tokens))
        # A session stores what it has read when a segment is full, or it is closed: here neither happens.
        memories = reader.memory if with_memory else None
        session, new, pending = (
            Session(reader.model, memories, batch_size=1, segment_length=self.longest),
            list[int](),
            prompt,
        )
        for _ in range(sampling.new_tokens):
            pending = sample(session.read([pending]), sampling.temperature, None, None, source).tolist()
            new += pending
        return new

    def explained(self, prompt: list[int], new: list[int], *, measure: bool, asked: Any = None) -> Explanation:
        """What is looked up for a prompt and what follows. measure: also what passages are worth. asked: for which
        question the prompt was made."""
        reader = self.reader
        return explain(
            reader.model,
            prompt + new if asked is None else replace(asked, written=torch.tensor(new)),
            reader.memory,
            tokenizer=reader.tokenizer,
            contribution="ablate" if measure else None,
            passage=PASSAGE,
            prompt=len(prompt) if reader.is_of_spans else 0,
        )
