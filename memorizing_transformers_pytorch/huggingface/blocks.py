"""A text with its passages before it, block by block as `generate` writes it, or in its prompt, as `ask` places them:
what stood there, and what it got.

Shapes: N tokens of the text, T of a block, V of the vocabulary, L layers, H query heads, P positions of passages, E
passages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.huggingface import prefix as prefixes
from memorizing_transformers_pytorch.huggingface.calls import Call
from memorizing_transformers_pytorch.huggingface.interface import (
    BACKENDS,
    QUERIES_AT_ONCE,
    Extension,
    Local,
    leave,
    use,
)
from memorizing_transformers_pytorch.huggingface.models import evaluating
from memorizing_transformers_pytorch.huggingface.prompts import Excerpt, Placed
from memorizing_transformers_pytorch.huggingface.recall import QUERY
from memorizing_transformers_pytorch.huggingface.recalling import RecallMemory


@dataclass(frozen=True)
class WatchedBlock:
    """Tokens from `start` to `stop` of a text, with the same passages before them; they predict those one later.

    places: of each passage, where it begins; from 0 on in the text, below 0 before it.
    weights: (L, H, T, E), the attention that each token gives to each passage; without layers, if that is not known.
    peaks: (L, H, T, E), to which token of the passage it gives most. layers: their numbers (L,).
    """

    start: int
    stop: int
    passages: list[Excerpt]
    places: list[int]
    weights: Tensor
    peaks: Tensor
    layers: list[int]


class BlockReader:
    """Runs the model of a memory on texts, as `generate` would have written them.

    row: of the memory. question: (T,), by which passages are found. Without one they are found as by `generate`: those
    of the first block by the last tokens of the prompt, and then every `every` tokens anew by the tokens before. Where
    a text cannot move to other positions in the cache, each block is run with all of the text before it.
    """

    def __init__(self, memory: RecallMemory, row: int, question: Tensor | None) -> None:
        self._memory, self._row, self._question = memory, row, question

    def run(self, tokens: Tensor, prompt: int, *, attention: bool = False) -> tuple[Tensor, list[WatchedBlock]]:
        """Run the model on tokens (N,), which begin with a prompt of `prompt` tokens -> logits (N, V), and blocks."""
        memory, logits, blocks = self._memory, list[Tensor](), list[WatchedBlock]()
        goes_on, cache, watched = memory._recall.search.can_turn, prefixes.new_cache(), _Watch(memory)
        with memory.read_only(), evaluating(memory.model), watched.on() if attention else ExitStack():
            for start, stop in self._calls(len(tokens), prompt):
                ids = tokens[None, start if goes_on else 0 : stop].to(memory.model.device)
                cache = cache if goes_on else prefixes.new_cache()
                with memory.finding_by(self._found_by(tokens, start, prompt), self._row) as standing:
                    out = memory.model(input_ids=ids, past_key_values=cache, use_cache=True)
                logits.append(out.logits[0, start - stop :].float().cpu())
                passages = standing()
                places = [-sum(len(each.tokens) for each in passages[i:]) for i in range(len(passages))]
                blocks.append(WatchedBlock(start, stop, passages, places, *watched.taken(passages, stop - start)))
        return torch.cat(logits), blocks

    def _calls(self, count: int, prompt: int) -> Iterator[tuple[int, int]]:
        """Which tokens go through the model with the same passages: the last one of a block predicts the next block."""
        every, start = self._memory.options.every, 0
        for stop in (*range(prompt + every - 1, count - 1, every), count):
            if stop > start:
                yield start, stop
                start = stop

    def _found_by(self, tokens: Tensor, start: int, prompt: int) -> Tensor:
        if self._question is not None:
            return self._question
        known = start + 1 if start else prompt
        return tokens[max(known - QUERY, 0) : known]


class PromptReader:
    """Runs the model of a memory on one text, whose prompt holds passages. Where one is hidden, or part of it, the
    model is given the text without these tokens; their logits are 0."""

    def __init__(self, memory: RecallMemory, placed: Sequence[Placed]) -> None:
        self._memory, self._placed = memory, placed

    def run(self, tokens: Tensor, _prompt: int, *, attention: bool = False) -> tuple[Tensor, list[WatchedBlock]]:
        """The logits of tokens (N, V), and all of the text as one block."""
        memory, shown = self._memory, torch.ones(len(tokens), dtype=torch.bool)
        for passage, start in self._placed:
            shown[start : start + len(passage.tokens)] = self._shown(passage)
        columns = [torch.arange(start, start + len(passage.tokens)) for passage, start in self._placed]
        watched = _Watch(memory, torch.cat(columns) if columns else torch.zeros(0, dtype=torch.int64))
        attention = attention and bool(shown.all())
        with memory.enabled(False), evaluating(memory.model), watched.on() if attention else ExitStack():
            out = memory.model(input_ids=tokens[None, shown].to(memory.model.device), use_cache=False)
        logits = torch.zeros(len(tokens), out.logits.shape[-1])
        logits[shown] = out.logits[0].float().cpu()
        passages, places = [each.passage for each in self._placed], [each.start for each in self._placed]
        return logits, [WatchedBlock(0, len(tokens), passages, places, *watched.taken(passages, len(tokens)))]

    def _shown(self, passage: Excerpt) -> Tensor:
        """Which tokens of a passage may be seen (P,)."""
        memory, count = self._memory, len(passage.tokens)
        if not memory._at_work.enabled.now:
            return torch.zeros(count, dtype=torch.bool)
        hidden = next(iter(memory.layers.values())).memories[0].hidden.now
        if hidden is None or passage.document not in memory.ledger:
            return torch.ones(count, dtype=torch.bool)
        first = memory.ledger[passage.document].start + passage.position
        origins = torch.stack((torch.full((count,), passage.document), torch.arange(first, first + count)), dim=1)
        return ~hidden.among(origins)


class _Watch(Extension):
    """Notes how much attention the tokens of a call give to each position of its passages: (H, T, P) for each layer.

    columns: where the passages lie in the text (P,), if they do not stand before it.
    """

    def __init__(self, memory: RecallMemory, columns: Tensor | None = None) -> None:
        self._memory, self._thread, self._seen = memory, threading.get_ident(), list[Tensor]()
        self._columns, self.layers = columns, list[int]()

    @contextmanager
    def on(self) -> Iterator[None]:
        known = self._memory._recall.search.layers.items()
        modules: dict[int, Any] = {number: each.module for number, each in known if each is not None}
        with self._memory._at_work.lock, ExitStack() as stack:  # of two that watch, the second waits
            for number, module in modules.items():
                if module.config._attn_implementation not in BACKENDS:
                    continue
                self.layers.append(number)
                use(module, self)
                stack.callback(leave, module)
            yield

    def joined(self, module: nn.Module, out: Tensor, query: Tensor, local: Local) -> Tensor:
        columns, count = self._standing(), query.shape[2]
        if columns is not None and threading.get_ident() == self._thread:
            parts = [slice(start, start + QUERIES_AT_ONCE) for start in range(0, count, QUERIES_AT_ONCE)]
            rows = [local.masked(query[:, :, part], part, count).softmax(dim=-1)[0].cpu() for part in parts]
            self._seen.append(torch.cat([row[..., columns] for row in rows], dim=1))
        return out

    def _standing(self) -> Tensor | None:
        """Which positions of the call hold passages (P,)."""
        if self._columns is not None:
            return self._columns
        call: Call | None = self._memory._recall.search._shared.call.now
        return None if call is None or call.prefix is None else torch.arange(call.prefix.size)

    def taken(self, passages: Sequence[Excerpt], count: int) -> tuple[Tensor, Tensor, list[int]]:
        """Of the last call, (L, H, T, E): the attention on each passage, and which of its positions got most; and the
        numbers of the layers."""
        seen, self._seen = self._seen, []
        layers = self.layers if seen else []
        weights = (
            torch.stack(seen)[..., -count:, :]
            if seen
            else torch.zeros(0, 0, count, sum(len(each.tokens) for each in passages))
        )
        if not passages:
            return weights, weights.long(), layers
        parts = torch.split(weights, [len(each.tokens) for each in passages], dim=-1)
        totals = torch.stack([part.sum(dim=-1) for part in parts], dim=-1)
        return totals, torch.stack([part.argmax(dim=-1) for part in parts], dim=-1), layers
