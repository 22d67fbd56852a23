"""A memory attached to a causal language model of transformers.

Shapes: B rows of a batch, R rows of the memory, N tokens of a document, G key/value heads, T tokens of a chunk, D head
width.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memorizing_transformers_pytorch.huggingface import interface
from memorizing_transformers_pytorch.huggingface.fingerprint import Weights
from memorizing_transformers_pytorch.huggingface.memory_layer import GATE_START, HeadBias, MemoryLayer, Reading
from memorizing_transformers_pytorch.huggingface.options import Options
from memorizing_transformers_pytorch.huggingface.probe import Layer
from memorizing_transformers_pytorch.huggingface.reader import Reader
from memorizing_transformers_pytorch.huggingface.texts import checked_texts, pieces_of
from memorizing_transformers_pytorch.memory import KNNMemory

MODULE = "memory_bias"  # the name of the added module in an attention module


@dataclass(frozen=True)
class Document:
    """What was read: its number, title, row of the memory and how many tokens it had."""

    number: int
    title: str
    row: int
    tokens: int


class AttachedMemory:
    """The memory of a model, from `attach_memory`.

    options: what it was attached with. layers: the memory of each layer, by its number.
    """

    def __init__(self, model: Any, layers: list[Layer], options: Options) -> None:
        self.model, self.options = model, options
        self.layers: dict[int, MemoryLayer] = {}
        self._documents: list[Document] = []
        self._numbers = itertools.count()
        self._reading = Reading([0], torch.zeros(1, dtype=torch.int64))
        self._attached = True
        self._weights = Weights(model, MODULE)
        self._written_by: str | None = None
        self._weights_seen: tuple[Any, ...] | None = None
        self._hooks = []
        memories = [self._memory(layer, 1) for layer in layers]  # whatever fails, fails before the model is touched
        for layer, memory in zip(layers, memories, strict=True):
            module: Any = layer.module
            weight = next(module.parameters())
            bias = HeadBias(layer.heads, 0.0 if options.combine == "softmax" else GATE_START, weight.device)
            distance = options.distance if options.positions == "constant" else None
            made = self.layers[layer.index] = MemoryLayer(
                layer, memory, options.combine, options.topk, distance, bias, self._reading
            )
            module.add_module(MODULE, bias)
            interface.use(module, made)
            self._hooks.append(module.register_forward_pre_hook(made.remember_positions, with_kwargs=True))
        self._hooks.append(model.register_forward_pre_hook(self._warn_of_other_weights))

    def _memory(self, layer: Layer, rows: int) -> KNNMemory:
        weight, options = next(layer.module.parameters()), self.options
        device = weight.device if options.device is None else torch.device(options.device)
        return KNNMemory(
            layer.width,
            options.max_memories,
            rows,
            num_kv_heads=layer.kv_heads,
            dtype=weight.dtype if options.dtype is None else options.dtype,
            device=device,
            index=options.index,
            directory=options.directory,
        )

    def __repr__(self) -> str:
        if not self._attached:
            return "AttachedMemory(detached)"
        entries = {index: layer.memory.num_entries for index, layer in self.layers.items()}
        return f"AttachedMemory(layers={list(self.layers)}, entries={entries}, bytes={self.num_bytes:,})"

    @property
    def num_rows(self) -> int:
        """R: how many documents are remembered side by side."""
        return next(iter(self.layers.values())).memory.num_indices

    @property
    def num_bytes(self) -> int:
        """What the entries take: keys, values, origins and ages."""
        total = 0
        for layer in self.layers.values():
            store = layer.memory.store
            per_entry = 2 * layer.layer.kv_heads * layer.layer.width * store.keys.itemsize + 32
            total += per_entry * sum(layer.memory.num_entries)
        return total

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document: str | list[str] | None = None,
        progress: bool = True,
    ) -> None:
        """Read documents into the memory, a chunk at a time; each chunk sees what was read before.

        input_ids: (N,), (1, N), or (R, N) for a batch of documents, each into its own row. A memory of one row serves
            all rows of a batch later. The first read decides on R; `clear()` lets the next one decide again.
        attention_mask: (R, N), 0 for padding, which may be anywhere and is not remembered.
        document: a title, or one for each row.

        Raises ValueError, with nothing read, for shapes that do not fit, token ids that the model does not have, or
        empty texts.
        """
        self._read(input_ids, attention_mask, document, progress, losses=False)

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document: str | list[str] | None = None,
        progress: bool = True,
    ) -> list[Tensor]:
        """`read`, and the loss (in nats) of each token of each document, without padding, as it was read: (N,) float32.

        A token is predicted from the part of its chunk before it, and the memory. The first of a document is NaN, and
        with skip_first=0, where chunks do not overlap, the first of each chunk.
        """
        return self._read(input_ids, attention_mask, document, progress, losses=True)

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        document: str | list[str] | None,
        progress: bool,
        losses: bool,
    ) -> list[Tensor]:
        texts = checked_texts(input_ids, attention_mask, self.model.get_input_embeddings().weight.shape[0])
        titles = [document] * len(texts) if document is None or isinstance(document, str) else list(document)
        if len(titles) != len(texts):
            raise ValueError(f"expected a title for each of {len(texts)} documents, got {len(titles)}")
        self._make_rows(len(texts))
        self._refuse_other_weights()
        numbers = [next(self._numbers) for _ in texts]
        reader = Reader(self.model, list(self.layers.values()), self._reading, self.options.skip_first, numbers)
        found = [torch.full((len(text),), torch.nan) for text in texts]
        pieces = pieces_of([len(text) for text in texts], self.options.chunk, self.options.skip_first)
        with reader, tqdm(total=sum(map(len, texts)), unit=" tokens", disable=not progress) as bar:
            try:
                for some in pieces:
                    reader.read(some, texts, found if losses else None)
                    bar.update(sum(piece.new for piece in some))
            finally:  # also of what was broken off
                for row, (number, title, size) in enumerate(zip(numbers, titles, reader.read_of_each(), strict=True)):
                    if size:
                        self._documents.append(Document(number, title or f"document {number}", row, size))
        return found

    def _make_rows(self, rows: int) -> None:
        """Let the memory have so many rows. Raises ValueError if it has others, and remembers something."""
        if not self._attached:
            raise ValueError("expected an attached memory, got one that detach() has taken away")
        if rows == self.num_rows:
            return
        if self._documents:
            raise ValueError(f"expected {self.num_rows} documents, one for each row of the memory, got {rows}")
        made = [self._memory(layer.layer, rows) for layer in self.layers.values()]
        for layer, memory in zip(self.layers.values(), made, strict=True):
            layer.memory.cleanup()
            layer.memory, layer.last_lookup = memory, None
        self._reading.stand_at(torch.zeros(rows, dtype=torch.int64))

    def _refuse_other_weights(self) -> None:
        """Raises ValueError if something was read with other weights; else notes those of the model."""
        fingerprint = self._weights.fingerprint()
        if self._documents and fingerprint != self._written_by:
            raise ValueError("expected the weights that have read what is remembered, got others: clear() it first")
        self._written_by, self._weights_seen = fingerprint, self._weights.state()

    def _warn_of_other_weights(self, *_: Any) -> None:
        """A forward pre-hook of the model."""
        if self._documents and self._weights_seen != (state := self._weights.state()):
            self._weights_seen = state
            if self._weights.fingerprint() != self._written_by:
                warnings.warn(
                    "the weights have changed since they read what is remembered: it fits badly", stacklevel=2
                )

    def documents(self) -> list[Document]:
        """What was read since the rows were last cleared."""
        return list(self._documents)

    def clear(self, rows: int | Iterable[int] | None = None) -> None:
        """Forget what was read into these rows, or all. Raises ValueError for rows that there are not."""
        cleared = next(iter(self.layers.values())).memory.rows_to_clear(rows)
        for layer in self.layers.values():
            layer.memory.clear(cleared)
            layer.last_lookup = None
        self._documents = [each for each in self._documents if each.row not in cleared]
        offsets = self._reading.offsets.clone()
        offsets[cleared] = 0
        self._reading.stand_at(offsets)

    @contextlib.contextmanager
    def enabled(self, on: bool = True) -> Iterator[None]:
        """Inside, the memory is read, or with False it is not: the model is as it was."""
        before = {layer: layer.enabled for layer in self.layers.values()}
        for layer in self.layers.values():
            layer.enabled = on
        try:
            yield
        finally:
            for layer, enabled in before.items():
                layer.enabled = enabled

    @property
    def last_retrieved(self) -> dict[int, Tensor]:
        """What the last call of the model looked up in each layer: origins (R, H, T, K, 3), as document number,
        position and token id; -1 where nothing was found."""
        found = {}
        for index, layer in self.layers.items():
            if layer.last_lookup is not None:
                origins = layer.memory.origins(layer.last_lookup.slots)
                found[index] = origins.masked_fill(~layer.last_lookup.mask.unsqueeze(-1), -1)
        return found

    def parameters(self) -> list[torch.nn.Parameter]:
        """The bias of each head of each layer with a memory: what can be learned of the joining."""
        return [layer.bias.bias for layer in self.layers.values()]

    def detach(self) -> None:
        """Take the memory away, and forget what it holds. The model is bit for bit what it was."""
        if not self._attached:
            return
        self._attached = False
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers.values():
            interface.leave(layer.layer.module)
            delattr(layer.layer.module, MODULE)
            layer.memory.cleanup()
