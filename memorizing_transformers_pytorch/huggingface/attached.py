"""A memory attached to a causal language model of transformers.

Shapes: B rows of a batch, R rows of the memory, N tokens of a document, T tokens of a call, H query heads, K retrieved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memorizing_transformers_pytorch.huggingface.calls import Call, Calls
from memorizing_transformers_pytorch.huggingface.contents import Contents
from memorizing_transformers_pytorch.huggingface.keeping import Keeping
from memorizing_transformers_pytorch.huggingface.memory_layer import BIAS
from memorizing_transformers_pytorch.huggingface.options import Options
from memorizing_transformers_pytorch.huggingface.probe import vocabulary_of
from memorizing_transformers_pytorch.huggingface.reader import Reader
from memorizing_transformers_pytorch.huggingface.segments import Segments
from memorizing_transformers_pytorch.huggingface.site import Reading, Site
from memorizing_transformers_pytorch.huggingface.texts import Titles, checked_texts, checked_titles
from memorizing_transformers_pytorch.huggingface.trained import load_parameters, save_parameters
from memorizing_transformers_pytorch.huggingface.window import Window, ends_of
from memorizing_transformers_pytorch.memory.ledger import Document
from memorizing_transformers_pytorch.utils.fingerprint import Weights


class AttachedMemory(Keeping):
    """The memory of a model, from `attach_memory`.

    options: what it was attached with. layers: those with a memory, by number.
    """

    def __init__(self, model: Any, sites: list[Site], reading: Reading, options: Options) -> None:
        self.model, self.options = model, options
        self.layers = {site.index: site for site in sites}
        contents = Contents(sites, reading)
        window = None if options.window is None else Window(contents, options.window, ends_of(model))
        super().__init__(contents, Weights(model, BIAS), Segments(contents, options.skip_first), window)
        self._is_reading = False
        for site in sites:
            site.attach()
        self._calls = Calls(model, self._before_call, self._after_call)

    def __repr__(self) -> str:
        if not self._attached:
            return "AttachedMemory(detached)"
        entries = {index: site.num_entries for index, site in self.layers.items()}
        return f"AttachedMemory(layers={list(self.layers)}, entries={entries}, bytes={self.num_bytes:,})"

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document: Titles = None,
        progress: bool = True,
        look_up: bool = False,
    ) -> None:
        """Read documents into the memory, a chunk at a time.

        input_ids: (N,), (1, N), or (R, N) for a batch of documents, each into its own row. A memory of one row serves
            all rows of a batch later; one of several is for as many prompts, or a multiple. (The beams of fewer prompts
            cannot be told from them, and would each see another document.) The first read decides on R; `clear()` lets
            the next one decide again.
        attention_mask: (R, N), 0 for padding, which may be anywhere and is not remembered.
        document: a title, or one for each row.
        look_up: whether each chunk sees what was read before. What is remembered then is a little nearer to what the
            model would make of the whole text, but a chunk takes longer the more is remembered.

        Raises ValueError, with nothing read, for shapes that do not fit, token ids that the model does not have,
        empty texts, other weights than those that have read before, or inside `read_only()`.
        """
        self._expect_writable()
        with contextlib.nullcontext() if look_up else self.enabled(False):
            self._read(input_ids, attention_mask, document, progress, losses=False)

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document: Titles = None,
        progress: bool = True,
    ) -> list[Tensor]:
        """`read`, looking up what was read before, and the loss (in nats) of each token of each document, without
        padding, as it was read: (N,) float32.

        A token is predicted from the part of its chunk before it, and the memory. The first of a document is NaN, and
        with skip_first=0, where chunks do not overlap, the first of each chunk. Inside `read_only()` nothing is
        remembered, so each chunk sees only what was read before this text.
        """
        return self._read(input_ids, attention_mask, document, progress, losses=True)

    def go_on(self, document: int, input_ids: Tensor, progress: bool = True) -> None:
        """Read on in a document that was not read to its end, the last of the only row.

        document: its number. input_ids: (N,), the whole document from its beginning.
        Raises ValueError, with nothing read, for another document, or one that is no longer.
        """
        self._expect_writable()
        known = self.last_document
        if known is None or known.number != document or input_ids.numel() < known.tokens:
            raise ValueError(f"expected more of the last document in the only row, {known}, got document {document}")
        with self.enabled(False):
            self._read(input_ids, None, None, progress, losses=False, goes_on=known)

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        document: Titles,
        progress: bool,
        losses: bool,
        goes_on: Document | None = None,
    ) -> list[Tensor]:
        self._expect_attached()
        if self._segments.is_open:
            raise ValueError("expected a call of the model inside writing(), got read() or score()")
        texts = checked_texts(input_ids, attention_mask, vocabulary_of(self.model))
        titles = checked_titles(document, len(texts))
        if self._contents.ledger:
            self._weights.refuse_others()
        if self._window is not None and self._writable:
            self._window.end()
        self._contents.make_rows(len(texts))
        numbers = self._contents.begin(titles) if goes_on is None else [goes_on.number]
        known = [0] * len(texts) if goes_on is None else [goes_on.tokens]
        self._is_reading = True
        self._weights.have_written()
        try:
            reader = Reader(self.model, self._contents, self.options, numbers, known, store=self._writable)
            return reader.read_all(texts, losses=losses, progress=progress)
        finally:
            self._is_reading = False

    @contextlib.contextmanager
    def writing(self, document: Titles = None) -> Iterator[None]:
        """Inside, one call of the model, and its backward pass, after which its tokens are remembered: for training.

            for segment in book.split(512, dim=1):  # (R, 512)
                with memory.writing():
                    model(input_ids=segment, labels=segment).loss.backward()
                optimizer.step()

        Documents are read in order: each row goes on with its own until `clear` has emptied it. As in the paper
        (section 3), what was read stays as the weights of then have made it, however they change. The first
        `skip_first` tokens of each segment are not remembered. If something is raised inside, nothing is.

        Raises ValueError inside `read_only()`, and for a batch of other rows than the memory has.
        """
        self._expect_attached()
        self._expect_writable()
        if self._window is not None:
            self._window.end()
        with self._segments.remembered(document):
            yield
        self._weights.have_written()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Inside, the memory is used but nothing is remembered, whatever passes; `read` and `writing` refuse."""
        before, self._writable = self._writable, False
        try:
            yield
        finally:
            self._writable = before

    def _before_call(self, see: Callable[[], Call]) -> None:
        self._contents.reading.call = see() if any(site.sees_calls for site in self._contents.sites) else None
        if self._is_reading:
            return
        if self._segments.is_open:
            self._segments.before(see())
            return
        if self._contents.ledger:
            self._weights.warn_of_others()
        if self._window is not None and self._writable:
            first = not self._contents.ledger
            self._window.before(see())
            if first:
                self._weights.have_written()
        elif self._window is not None and self._window.goes_on_with(see().cache):
            raise ValueError("expected a new conversation inside read_only(), got one that is being remembered")

    def _after_call(self) -> None:
        if self._window is not None and not self._is_reading and not self._segments.is_open:
            self._window.after()

    @contextlib.contextmanager
    def enabled(self, on: bool = True) -> Iterator[None]:
        """Inside, the memory is read, or with False it is not: the model is as it was."""
        before = {site: site.enabled for site in self.layers.values()}
        for site in before:
            site.enabled = on
        try:
            yield
        finally:
            for site, enabled in before.items():
                site.enabled = enabled

    @property
    def last_retrieved(self) -> dict[int, Tensor]:
        """What the last call of the model looked up in each layer: origins (R, H, T, K, 3), as document number,
        position in the document and token id; -1 where nothing was found."""
        found = {index: site.last_retrieved for index, site in self.layers.items()}
        places = {index: origins for index, origins in found.items() if origins is not None}
        return {index: self._contents.ledger.in_documents(origins) for index, origins in places.items()}

    @contextlib.contextmanager
    def watched_row(self, row: int) -> Iterator[None]:
        """Inside, calls of the model with one row read this row of the memory, and layers keep their weights on it."""
        reading = self._contents.reading
        before = reading.offsets
        reading.rows, reading.offsets = [row], before[[row]]
        for site in self.layers.values():
            site.keeps_weights = True
        try:
            yield
        finally:
            reading.stand_at(before)
            for site in self.layers.values():
                site.keeps_weights = False
                site.forget_last()

    def place_of(self, row: int) -> int:
        """How many tokens were read into a row."""
        return int(self._contents.reading.offsets[self._contents.reading.rows.index(row)])

    def parameters(self) -> list[nn.Parameter]:
        """What was added to the model: the bias of each head of each layer with a memory, or the added layer."""
        self._expect_attached()
        return [parameter for site in self.layers.values() for parameter in site.parameters()]

    def save_parameters(self, path: str | Path) -> None:
        """Write `parameters()` to a safetensors file: all that has been trained, if the model itself was frozen."""
        self._expect_attached()
        save_parameters(self.layers, path)

    def load_parameters(self, path: str | Path) -> None:
        """Take them from such a file. Raises ValueError, changing nothing, for those of another attachment, and for a
        file that is missing or damaged."""
        self._expect_attached()
        load_parameters(self.layers, path)

    def detach(self) -> None:
        """Take the memory away, and forget what it holds. The model is bit for bit what it was."""
        if not self._attached:
            return
        self._attached = False
        self._calls.remove()
        for site in self.layers.values():
            site.detach()
