"""A model with its memory, run on some tokens with an eye on what each layer looks up: ours, or one of transformers.

Shapes: T tokens, H query heads, K retrieved, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList
from memorizing_transformers_pytorch.memory.search import Hidden
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.model.segment import shifted

COLUMNS = ("token", "layer", "head", "score", "weight", "document", "position", "source_token", "age")


def losses_of(logits: Tensor, ids: Tensor, prompt: int) -> np.ndarray:
    """(T,): of each token, as predicted from those before it; NaN for the first, and for those of the prompt."""
    losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none").numpy()
    return np.concatenate([[np.nan] * max(prompt, 1), losses[max(prompt - 1, 0) :]])


class LookedUp(NamedTuple):
    """What the heads of one layer found for each token, on the CPU.

    weights (H, T, K) float32: the attention on each entry; where nothing was found 0. scores (H, T, K): the inner
    product of query and key. origins (H, T, K, 3): document, place in what the row has read, token. ages (H, T, K): how
    many tokens or entries lie between. mask (H, T, K): where something was found.
    """

    layer: int
    weights: Tensor
    scores: Tensor
    origins: Tensor
    ages: Tensor
    mask: Tensor


class Trace(NamedTuple):
    """logits (T, V) float32, and what was looked up in each layer."""

    logits: Tensor
    layers: list[LookedUp]


class OurModel:
    """A `MemorizingTransformer` and one row of its memories. Nothing is stored of what it is run on."""

    longest: int | None = None  # as many tokens as there are

    def __init__(self, model: MemorizingTransformer, memories: KNNMemoryList, row: int) -> None:
        self._model, self._memories, self._row, self._is_blind = model, memories, row, False
        self.ledger = memories.ledger

    def run(self, tokens: Tensor) -> Trace:
        """Run on tokens (T,), as one segment."""
        model, seen = self._model, dict[int, LookedUp]()
        read = shifted(self._memories, model.config.shift_knn_memories_down)
        with ExitStack() as stack:
            for number, memory in zip(model.config.layers_with_memory, read, strict=True):
                block: Any = model.layers[number - 1][0]  # type: ignore[index]
                note = partial(self._note, seen, number, memory)
                stack.callback(block.register_forward_hook(note).remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(model.evaluating())
            memories = stack.enter_context(self._memories.at_batch_indices([self._row]))
            hidden = torch.tensor([self._is_blind], device=model.device)
            result = model(tokens[None].to(model.device), memories, add_knn_memory=False, hide_memory=hidden)
        logits: Tensor = result[0] if model.carries_state else result
        return Trace(logits[0].float().cpu(), [seen[number] for number in sorted(seen)])

    def _note(
        self, seen: dict[int, LookedUp], number: int, memory: KNNMemory, _block: Any, _inputs: Any, attended: Any
    ) -> None:
        reading = attended.reading
        if reading is not None:
            ranks = _ranks(memory, self._row, reading.lookup.slots[0].cpu())
            counts = torch.arange(ranks.shape[1])[:, None]
            seen[number] = _looked_up(number, memory, reading.lookup, reading.weights, ranks + 1 + counts)

    @property
    def memories(self) -> list[KNNMemory]:
        """Where the stored entries of any document can be read, the newest first."""
        return [self._memories[0]]

    @property
    def all_memories(self) -> Sequence[KNNMemory]:
        """The memories of every layer."""
        return self._memories

    def start_of(self, document: int) -> int:
        """At which place of the row a document begins."""
        return 0

    @contextmanager
    def blind(self) -> Iterator[None]:
        """Inside, nothing is looked up."""
        self._is_blind = True
        try:
            yield
        finally:
            self._is_blind = False


def _ranks(memory: KNNMemory, row: int, slots: Tensor) -> Tensor:
    """How many entries of the row are newer than those in these slots."""
    store = memory.store
    order = store.places_in_order(row).cpu()
    ranks = torch.zeros(store.room, dtype=torch.int64)
    ranks[order] = torch.arange(len(order) - 1, -1, -1)
    return ranks[slots % store.room]


def _looked_up(layer: int, memory: KNNMemory, lookup: Any, weights: Tensor, ages: Tensor) -> LookedUp:
    """Of the first row of the batch."""
    mask = lookup.mask[0].cpu()
    origins = memory.origins(lookup.slots[0]).cpu()
    shown = weights[0].float().cpu().masked_fill(~mask, 0)
    return LookedUp(layer, shown, lookup.scores[0].float().cpu(), origins, ages, mask)


class AttachedModel:
    """The same for a model of transformers with an attached memory."""

    def __init__(self, memory: Any, row: int) -> None:
        self._memory, self._row = memory, row
        self.ledger = memory.ledger

    def run(self, tokens: Tensor) -> Trace:
        with torch.no_grad(), self._memory.watched_row(self._row) as watched, self._memory.read_only():
            device = self._memory.model.get_input_embeddings().weight.device
            logits = self._memory.model(input_ids=tokens[None].to(device), use_cache=False).logits
        here = watched.place + torch.arange(len(tokens))[:, None]
        layers = [_joined(index, each, here) for index, each in watched.found.items() if each.weights is not None]
        return Trace(logits[0].float().cpu(), layers)

    @property
    def longest(self) -> int | None:
        from memorizing_transformers_pytorch.huggingface.models import positions_of

        return positions_of(self._memory.model)

    @property
    def memories(self) -> list[KNNMemory]:
        return list(next(iter(self._memory.layers.values())).memories)

    def start_of(self, document: int) -> int:
        return self.ledger[document].start if document in self.ledger else 0

    def blind(self) -> AbstractContextManager[None]:
        off: AbstractContextManager[None] = self._memory.enabled(False)
        return off

    @property
    def all_memories(self) -> Sequence[KNNMemory]:
        return [memory for layer in self._memory.layers.values() for memory in layer.memories]


def _joined(index: int, found: Any, here: Tensor) -> LookedUp:
    """What a layer has found in each of its memories, one after the other."""
    lookups = [lookup for lookup in found.lookups if lookup is not None]
    scores = torch.cat([lookup.scores[0].float().cpu() for lookup in lookups], dim=2)
    mask = torch.cat([lookup.mask[0].cpu() for lookup in lookups], dim=2)
    origins, weights = found.origins()[0].cpu(), found.weights[0].float().cpu().masked_fill(~mask, 0)
    return LookedUp(index, weights, scores, origins, here - origins[..., 1], mask)


class Blocks(NamedTuple):
    """logits (T, V) float32, and the blocks of the text with the passages that stood before each."""

    logits: Tensor
    blocks: list[Any]


class PassageModel:
    """The same for a memory of passages: the model runs on a text as if it had written all but the prompt.

    prompt: how many tokens come first that it was given. question: by which passages are found, if not by the text.
    placed: the passages that the prompt holds; None if they stand before it.
    """

    def __init__(self, memory: Any, row: int, prompt: int, question: Any, placed: Any) -> None:
        from memorizing_transformers_pytorch.huggingface.blocks import BlockReader, PromptReader
        from memorizing_transformers_pytorch.huggingface.texts import tokens_of

        asked = None if question is None else tokens_of(question, memory.tokenizer, memory.model)
        self._memory, self.ledger, self.prompt = memory, memory.ledger, prompt
        self._reader = BlockReader(memory, row, asked) if placed is None else PromptReader(memory, placed)

    def run(self, tokens: Tensor, *, attention: bool = False) -> Blocks:
        """attention: also what attention passages get."""
        return Blocks(*self._reader.run(tokens, self.prompt, attention=attention))

    @property
    def longest(self) -> int | None:
        """How many tokens have a position beside those of the passages."""
        from memorizing_transformers_pytorch.huggingface.models import positions_of

        most = positions_of(self._memory.model)
        return None if most is None else max(most - self._memory.options.budget, 1)

    @property
    def first(self) -> int:
        """How many tokens of the beginning of a document come along."""
        return int(self._memory.options.first)

    @property
    def all_memories(self) -> Sequence[KNNMemory]:
        return [memory for layer in self._memory.layers.values() for memory in layer.memories]

    def start_of(self, document: int) -> int:
        return int(self.ledger[document].start) if document in self.ledger else 0

    def blind(self) -> AbstractContextManager[None]:
        off: AbstractContextManager[None] = self._memory.enabled(False)
        return off


Watched = OurModel | AttachedModel | PassageModel


@contextmanager
def hiding(watched: Watched, document: int, first: int, last: int) -> Iterator[None]:
    """Inside, look-ups find the best entries outside these places (`last` included) of a document; of passages, what is
    outside is left."""
    with ExitStack() as stack:
        for memory in watched.all_memories:
            stack.enter_context(memory.hidden.at(Hidden(document, first, last)))
        yield


def watched(
    model: nn.Module, memories: Any, row: int, prompt: int = 0, question: Any = None, placed: Any = None
) -> Watched:
    """prompt, question, placed: see `PassageModel`. Raises ValueError for a model without a memory of its kind, a row
    that does not exist, or a question to a memory of tokens."""
    if isinstance(model, MemorizingTransformer):
        if not isinstance(memories, KNNMemoryList) or len(memories) != len(model.config.layers_with_memory):
            raise ValueError(f"expected the memories of this model as a KNNMemoryList, got {type(memories).__name__}")
        if not memories:
            raise ValueError("expected a model with a memory, got one that has no layers with a memory")
    elif not hasattr(memories, "watched_row") or memories.model is not model:
        raise ValueError(f"expected the memory that is attached to this model, got {type(memories).__name__}")
    rows = memories[0].num_indices if isinstance(memories, KNNMemoryList) else memories.num_rows
    if not 0 <= row < rows:
        raise ValueError(f"expected a row from 0 to {rows - 1}, got {row}")
    if hasattr(memories, "finding_by"):
        return PassageModel(memories, row, prompt, question, placed)
    if question is not None:
        raise ValueError("a question finds passages: it needs a memory made with attach_memory(retrieve='spans')")
    return OurModel(model, memories, row) if isinstance(model, MemorizingTransformer) else AttachedModel(memories, row)
