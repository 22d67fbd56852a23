"""A memory attached to a causal language model of transformers.

Shapes: B rows of a batch, R rows of the memory, N tokens of a document, T tokens of a call, H query heads, K retrieved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from memorizing_transformers_pytorch.huggingface.attachment import Attachment
from memorizing_transformers_pytorch.huggingface.calls import Shared, State, WatchedRow
from memorizing_transformers_pytorch.huggingface.contents import Titles
from memorizing_transformers_pytorch.huggingface.layer import BaseLayer, StoreOptions, load_parameters, save_parameters
from memorizing_transformers_pytorch.huggingface.recall import Recall
from memorizing_transformers_pytorch.huggingface.texts import Readable, ToRead, to_read
from memorizing_transformers_pytorch.huggingface.writing import TrainingSegment
from memorizing_transformers_pytorch.memory.disk.save import check_folder
from memorizing_transformers_pytorch.memory.lease import Origin
from memorizing_transformers_pytorch.memory.ledger import Document, DocumentTable, Ledger


class AttachedMemory:
    """The memory of a model, from `attach_memory`.

    options: what it was attached with. layers: those with a memory, by number.

    Several threads may call the model at the same time, also while one of them changes the memory. `enabled`,
    `read_only`, `watched_row` and `writing` hold for the thread (or task) that is inside of them alone. A change of the
    memory waits until other changes are over; a call that only looks up waits for nothing.
    """

    options: Any

    def __init__(
        self,
        model: Any,
        layers: list[BaseLayer],
        shared: Shared,
        options: StoreOptions,
        recall: Recall | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.model, self.options, self.tokenizer = model, options, tokenizer
        self._at_work = Attachment(model, layers, shared, options, recall)
        self._at_work.handle = self
        self._contents, self.layers = self._at_work.contents, self._at_work.contents.layers

    def __repr__(self) -> str:
        if not self._at_work.is_attached:
            return "AttachedMemory(detached)"
        entries = {index: layer.num_entries for index, layer in self.layers.items()}
        return f"AttachedMemory(layers={list(self.layers)}, entries={entries}, bytes={self.num_bytes:,})"

    def __enter__(self) -> Self:
        """`with attach_memory(model) as memory:` takes the memory away at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def read(
        self,
        input_ids: Readable,
        attention_mask: Tensor | None = None,
        document: Titles = None,
        progress: bool = True,
        look_up: bool = False,
    ) -> None:
        """Read documents into the memory, a chunk at a time.

        input_ids: (N,), (1, N), or (R, N) for a batch of documents, each into its own row. A memory of one row serves
            all rows of a batch later; one of several is for as many prompts, or a multiple. The first read decides on
            R; `clear()` lets the next one decide again. Or what a tokenizer gives. Or, if the memory has a tokenizer:
            text, or a Path to a file or a folder. Each file in a folder is a document; those without text are skipped.
        attention_mask: (R, N), 0 for padding, which may be anywhere and is not stored.
        document: a title, or one for each document; of a file its name, and below a folder its path, unless given.
        look_up: whether each chunk sees what was read before. What is stored then is a little nearer to what the
            model would make of the whole text, but a chunk takes longer the more is remembered.

        Raises ValueError, with nothing read, for shapes that do not fit, token ids that the model does not have,
        empty texts, other weights than those that have read before, or inside `read_only()`.
        """
        self._at_work.expect_writable()
        given = to_read(input_ids, attention_mask, document, self.tokenizer)
        self._at_work.read(given, progress, look_up=look_up)

    def score(
        self,
        input_ids: Readable,
        attention_mask: Tensor | None = None,
        document: Titles = None,
        progress: bool = True,
    ) -> list[Tensor]:
        """`read`, looking up what was read before, and the loss (in nats) of each token of each document, without
        padding, as it was read: (N,) float32.

        A token is predicted from the part of its chunk before it, and the memory. The first of a document is NaN, and
        with skip_first=0, where chunks do not overlap, the first of each chunk. The first `every` tokens of a document
        have no passages, as no tokens before them could find any. Inside `read_only()` nothing is stored, so each chunk
        sees only what was read before this text.
        """
        given = to_read(input_ids, attention_mask, document, self.tokenizer)
        return self._at_work.read(given, progress, losses=True)

    def go_on(self, document: int, input_ids: Tensor, progress: bool = True) -> None:
        """Read on in a document that was not read to its end, the last of the only row.

        document: its number. input_ids: (N,), the whole document from its beginning.
        Raises ValueError, with nothing read, for another document, or one that is no longer.
        """
        self._at_work.expect_writable()
        self._at_work.read([ToRead(input_ids, None, None)], progress, look_up=False, goes_on=document)

    @contextlib.contextmanager
    def writing(self, document: Titles = None) -> Iterator[None]:
        """Inside, one call of the model, and its backward pass, after which its tokens are stored: for training.

            for segment in book.split(512, dim=1):  # (R, 512)
                with memory.writing():
                    model(input_ids=segment, labels=segment).loss.backward()
                optimizer.step()

        Documents are read in order: each row goes on with its own until `clear` has emptied it. As in the paper
        (section 3), what was read stays as the weights of then have made it, however they change. The first
        `skip_first` tokens of each segment are not stored. If something is raised inside, nothing is.

        Raises ValueError inside `read_only()`, and for a batch of other rows than the memory has.
        """
        self._at_work.expect_attached()
        self._at_work.expect_writable()
        with self._at_work.lock:
            segment = TrainingSegment(self._contents, document, self.options.skip_first)
            with self._at_work.writer.at(segment):
                yield
            if segment.is_over:
                self._at_work.end_conversation()
                segment.store()
                self._at_work.weights.have_written()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Inside, the memory is used but nothing is stored, whatever passes; `read` and `writing` refuse."""
        with self._at_work.writable.at(False):
            yield

    @contextlib.contextmanager
    def enabled(self, on: bool = True) -> Iterator[None]:
        """Inside, the memory is read, or with False it is not: the model is as it was."""
        with self._at_work.enabled.at(on):
            yield

    @contextlib.contextmanager
    def watched_row(self, row: int) -> Iterator[WatchedRow]:
        """Inside, calls of the model with one row read this row of the memory -> what the last of them has found."""
        watched = WatchedRow(row)
        with self._at_work.watched.at(watched):
            yield watched

    @property
    def last_retrieved(self) -> dict[int, Tensor]:
        """What the last finished call of the model looked up in each layer: origins (R, H, T, K, 3), as number of the
        document, position in it and token id; -1 where nothing was found."""
        found = {index: each.origins() for index, each in self._at_work.last.items()}
        in_documents = self.ledger.in_documents
        return {index: in_documents(origins) for index, origins in found.items() if origins is not None}

    @property
    def num_rows(self) -> int:
        """R: how many documents are remembered side by side."""
        return self._contents.num_rows

    @property
    def ledger(self) -> Ledger:
        """Which documents are remembered."""
        return self._contents.ledger

    @property
    def last_document(self) -> Document | None:
        """With which document `go_on` can go on."""
        return self._contents.last_document()

    @property
    def num_bytes(self) -> int:
        """What the entries take: keys, values, origins and ages."""
        self._at_work.expect_attached()
        return sum(layer.num_bytes for layer in self.layers.values())

    def place_of(self, row: int) -> int:
        """How many tokens were read into a row."""
        return self._contents.state.offsets[row]

    def documents(self) -> DocumentTable:
        """What was read since the rows were last cleared, and what is held of each document."""
        self._at_work.expect_attached()
        return self._contents.memories().documents()

    def entries(self, row: int, layer: int) -> Iterator[Origin]:
        """Where each entry of a row comes from in a layer, the oldest first: document number, place in the row, token
        id. Raises ValueError if the row or the layer does not exist."""
        self._at_work.expect_attached()
        if layer not in self.layers:
            raise ValueError(f"expected a layer with a memory among {list(self.layers)}, got {layer}")
        return chain.from_iterable(memory.entries(row) for memory in reversed(self.layers[layer].memories))

    def forget(
        self,
        document: int | str | Iterable[int | str] | None = None,
        *,
        where: Callable[[Document], bool] | None = None,
    ) -> int:
        """Remove every entry of some documents; see `KNNMemoryList.forget`. A chat that is going on ends."""
        self._at_work.expect_attached()
        with self._at_work.lock:
            numbers = self._contents.memories().chosen(document, where)
            self._at_work.end_conversation()
            self._at_work.last = {}
            return self._contents.forget(numbers)

    def save(self, path: str | Path, *, overwrite: bool = False, compact: bool = False) -> None:
        """Write what is remembered to a folder; see `KNNMemoryList.save`. A chat that is going on ends."""
        self._at_work.expect_attached()
        with self._at_work.lock:
            check_folder(path, self._contents.state.marks, overwrite=overwrite)
            self._at_work.end_conversation()
            self._contents.save(path, self._at_work.weights.written_by, overwrite=overwrite, compact=compact)

    def load(
        self, path: str | Path, *, mmap: bool = False, verify: bool | None = None, other_weights: bool = False
    ) -> None:
        """Remember what `save` has written, and nothing else; see `KNNMemoryList.load`.

        other_weights: also take what other weights than those of the model have read; it counts as theirs from then on.
        Raises ValueError, changing nothing, for what cannot be loaded or is not of these layers.
        """
        with self._at_work.replacing():
            loaded = self._at_work.loaded(path, mmap=mmap, verify=verify, other_weights=other_weights)
            self._contents.use(self._contents.as_state(loaded))
            self._at_work.weights.have_written()
            if self._at_work.window is not None:
                self._at_work.window.drop()

    def search_with(self, index: str) -> None:
        """Search what is remembered, apart from recent entries, like this from now on: what was loaded is searched as
        it was when it was saved. Raises ValueError for an unknown index."""
        self._at_work.expect_attached()
        for layer in self.layers.values():
            layer.memories[-1].search_with(index)

    def exchange(self, kept: State | None) -> State:
        """Remember what was kept, or nothing, and give what was remembered until now, to be kept: several memories
        take turns with one model. Raises ValueError inside `writing()` and `read_only()`."""
        with self._at_work.replacing():
            self._at_work.end_conversation()
            before = self._contents.state._replace(writer=self._at_work.weights.writer)
            self._contents.use(kept)
            self._at_work.weights.writer = None if kept is None else kept.writer
            return before

    def merge(self, path: str | Path) -> None:
        """Add what was saved by the same weights, with as many rows, as if it had been read before what is read next.

        Where the memory has entries at their true distances (`recent`), the added ones are older than those. Oldest
        entries are evicted where not all fit. Raises ValueError as `load`, and if other weights have written.
        """
        self._at_work.merge(path)

    def clear(self, rows: int | Iterable[int] | None = None) -> None:
        """Forget what was read into these rows, or all. Raises ValueError for rows that do not exist."""
        self._at_work.expect_attached()
        with self._at_work.lock:
            cleared = self._contents.memories()[0].rows_to_clear(rows)
            if self._at_work.window is not None:
                self._at_work.window.end() if len(cleared) < self.num_rows else self._at_work.window.drop()
            self._contents.clear(cleared)
            self._at_work.last = {}

    def parameters(self) -> list[nn.Parameter]:
        """What was added to the model: the bias of each head of each layer with a memory."""
        self._at_work.expect_attached()
        return [parameter for layer in self.layers.values() for parameter in layer.parameters()]

    def save_parameters(self, path: str | Path) -> None:
        """Write `parameters()` to a safetensors file: all that has been trained, if the model itself was frozen."""
        self._at_work.expect_attached()
        save_parameters(self.layers, path)

    def load_parameters(self, path: str | Path) -> None:
        """Take them from such a file. Raises ValueError, changing nothing, if it does not fit or cannot be read."""
        self._at_work.expect_attached()
        load_parameters(self.layers, path)

    def detach(self) -> None:
        """Take the memory away, and forget what it holds. The model is bit for bit what it was."""
        self._at_work.detach()
