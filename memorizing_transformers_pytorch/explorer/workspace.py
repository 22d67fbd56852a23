"""A model and a memory of one's own: continuing and explaining a text, for models of both kinds.

Asking changes nothing that is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        return min(longest, MANY) if isinstance(self.reader, HubReader) else longest

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.reader.tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.reader.tokenizer.decode(list(tokens)))

    def continued(self, prompt: list[int], sampling: Sampling, *, with_memory: bool) -> list[int]:
        """The tokens that follow."""
        source, new, pending = torch.Generator().manual_seed(sampling.seed), list[int](), prompt
        with self._reading(with_memory) as logits_after:
            for _ in range(sampling.new_tokens):
                pending = sample(logits_after(pending), sampling.temperature, None, None, source).tolist()
                new += pending
        return new

    @contextmanager
    def _reading(self, with_memory: bool) -> Iterator[Callable[[list[int]], Tensor]]:
        """Inside, a function that reads the next tokens and gives the logits (1, V) after them."""
        if not isinstance(self.reader, HubReader):
            # A session stores what it has read when a segment is full, or it is closed: here neither happens.
            memories = self.reader.memory if with_memory else None
            session = Session(self.reader.model, memories, batch_size=1, segment_length=self.longest)
            yield lambda tokens: session.read([tokens])
            return
        model: Any = self.reader.model
        memory = self.reader.memory
        device, cache = model.get_input_embeddings().weight.device, None

        def read(tokens: list[int]) -> Tensor:
            nonlocal cache
            ids = torch.tensor([tokens], device=device)
            result = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, logits = result.past_key_values, result.logits[:, -1]
            return logits  # type: ignore[no-any-return]

        with ExitStack() as stack:
            for context in (torch.no_grad(), memory.read_only(), memory.enabled(with_memory)):
                stack.enter_context(context)
            yield read

    def explained(self, tokens: list[int], *, measure: bool) -> Explanation:
        """What is looked up for tokens. measure: also what passages are worth."""
        reader = self.reader
        return explain(
            reader.model,
            tokens,
            reader.memory,
            tokenizer=reader.tokenizer,
            contribution="ablate" if measure else None,
            passage=PASSAGE,
        )
