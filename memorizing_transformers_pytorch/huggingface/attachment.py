"""A memory at work in a model: the calls that it takes part in, and who may change it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from memorizing_transformers_pytorch.huggingface.calls import Call, Found, Lock, Shared, WatchedRow
from memorizing_transformers_pytorch.huggingface.contents import Contents, checked_titles
from memorizing_transformers_pytorch.huggingface.hooks import Hooks
from memorizing_transformers_pytorch.huggingface.layer import BaseLayer, StoreOptions
from memorizing_transformers_pytorch.huggingface.memory_layer import BIAS
from memorizing_transformers_pytorch.huggingface.models import name_of, vocabulary_of
from memorizing_transformers_pytorch.huggingface.reading import Reader, SideBySide, checked_texts
from memorizing_transformers_pytorch.huggingface.recall import Recall
from memorizing_transformers_pytorch.huggingface.searching import Recalled
from memorizing_transformers_pytorch.huggingface.span_layer import SpanOptions
from memorizing_transformers_pytorch.huggingface.span_reading import SpanReader
from memorizing_transformers_pytorch.huggingface.span_window import SpanWindow
from memorizing_transformers_pytorch.huggingface.texts import ToRead
from memorizing_transformers_pytorch.huggingface.writing import TrainingSegment, Window
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.memory.ledger import Document
from memorizing_transformers_pytorch.utils.context import PerContext
from memorizing_transformers_pytorch.utils.fingerprint import Weights


class Attachment:
    """What `AttachedMemory` stands on.

    lock: whoever changes the memory holds it. enabled, writable, watched, and writer (what stores the calls of the
    model instead of a conversation): of this thread or task; so is noted, where calls write what they have recalled.
    last: what the last call that is over found in each layer. handle: the `AttachedMemory` that stands on this.
    """

    def __init__(
        self, model: Any, layers: list[BaseLayer], shared: Shared, options: StoreOptions, recall: Recall | None
    ) -> None:
        self.model, self.options, self.recall = model, options, recall
        self.contents = Contents(layers, shared)
        self.weights, self.lock = Weights(model, BIAS), Lock()
        self.window = self._window(options)
        self.last: dict[int, Found] = {}
        self.enabled, self.writable = PerContext(True), PerContext(True)
        self.writer: PerContext[Reader | SpanReader | TrainingSegment | None] = PerContext(None)
        self.last_recalled: list[Recalled] = []
        self.noted: PerContext[list[Recalled] | None] = PerContext(None)
        self.watched: PerContext[WatchedRow | None] = PerContext(None)
        for layer in layers:
            layer.attach()
        if recall is not None:
            recall.attach()
        self.is_attached = True
        self.handle: Any = None
        self._hooks = Hooks(model, layers[0].module, shared.call, self._begin_call, self._end_call)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what the last call found stays behind."""
        return self.__dict__ | {"last": {}, "last_recalled": []}

    def detach(self) -> None:
        """Take the memory away, and forget what it holds."""
        with self.lock:
            if not self.is_attached:
                return
            self.is_attached, self.last = False, {}
            self._hooks.remove()
            for layer in self.contents.layers.values():
                layer.detach()
            if self.recall is not None:
                self.recall.detach()
            self.contents.close()

    def _begin_call(self, given: dict[str, Any], module: nn.Module) -> Call:
        state, watched = self.contents.state, self.watched.now
        rows = list(range(len(state.offsets))) if watched is None else [watched.row]
        call = Call(given, state.memories, rows, [state.offsets[row] for row in rows], self.enabled.now)
        if watched is not None:
            call.keeps_weights, watched.place = True, call.offsets[0]
        if self.recall is not None:
            self._begin_recalling(call, self.recall, module)
            return call
        writer: Any = self.writer.now
        if writer is None:
            if self.contents.ledger:
                self.weights.warn_of_others()
            if self._is_kept(call):
                writer = self.window
        if writer is None:
            call.check_rows()
        else:
            writer.before(call)
            call.writer = writer
        return call

    def _begin_recalling(self, call: Call, recall: Recall, module: nn.Module) -> None:
        call.is_kept = self._is_kept(call)
        recall.check(call)
        call.writer = self.window if call.is_kept else self.writer.now
        if self.writer.now is None and self.contents.ledger:
            self.weights.warn_of_others()
        if call.writer is not None:
            call.writer.before(call)
        try:
            recall.before(call, module)
        except BaseException:
            if call.writer is not None:  # which may hold the lock
                call.writer.after(call, failed=True)
            raise

    def _is_kept(self, call: Call) -> bool:
        """Whether what passes in this call is stored when it leaves the cache."""
        if self.window is None or self.writer.now is not None or call.cache is None:
            return False
        if not self.writable.now and self.window.goes_on_with(call.cache):
            raise ValueError("expected a new conversation inside read_only(), got one that is being remembered")
        return self.writable.now

    def _window(self, options: StoreOptions) -> Window | SpanWindow | None:
        if options.window is None:
            return None
        if isinstance(options, SpanOptions) and self.recall is not None:
            return SpanWindow(self.contents, options, self.model, self.lock, self.recall.search, self.weights)
        return Window(self.contents, options.window, self.model, self.lock)

    def _end_call(self, call: Call, failed: bool) -> None:
        if self.recall is not None:
            self.recall.after(call, failed)
            if call.writer is not None:
                call.writer.after(call, failed)
            if call.recalled is not None and not failed:
                self.last_recalled = call.recalled
                if self.noted.now is not None:
                    self.noted.now[:] = call.recalled
            return
        was_empty = not self.contents.ledger
        if call.writer is not None:
            call.writer.after(call, failed)
        if failed or isinstance(call.writer, Reader):
            return
        if isinstance(call.writer, Window) and was_empty:
            self.weights.have_written()
        self.last = call.found
        if (watched := self.watched.now) is not None:
            watched.found = call.found

    def end_conversation(self) -> None:
        if self.window is not None:
            self.window.end()

    def read(
        self,
        given: Sequence[ToRead],
        progress: bool,
        *,
        losses: bool = False,
        look_up: bool = True,
        goes_on: int | None = None,
    ) -> list[Tensor]:
        """See `AttachedMemory.read`, `score` and `go_on`."""
        self.expect_attached()
        if self.writer.now is not None:
            raise ValueError("expected a call of the model inside writing(), got read() or score()")
        size = vocabulary_of(self.model)
        texts = [checked_texts(each.input_ids, each.attention_mask, size) for each in given]
        titles = [checked_titles(each.titles, len(rows)) for each, rows in zip(given, texts, strict=True)]
        with self.lock if self.writable.now else contextlib.nullcontext():
            is_one = len(given) == 1  # else documents are counted, not their tokens
            bar = tqdm(texts, unit=" documents", disable=is_one or not progress)
            how: Any = {"losses": losses, "look_up": look_up, "goes_on": goes_on, "progress": progress and is_one}
            read = [self._read(rows, names, **how) for rows, names in zip(bar, titles, strict=True)]
            return [loss for each in read for loss in each]

    def _read(
        self,
        texts: list[Tensor],
        titles: list[str | None],
        *,
        losses: bool,
        look_up: bool,
        goes_on: int | None,
        progress: bool,
    ) -> list[Tensor]:
        """Read texts side by side."""
        store = self.writable.now
        known = None if goes_on is None else self._document_to_go_on_with(goes_on, len(texts[0]))
        if self.contents.ledger:
            self.weights.refuse_others()
        reader = self._reader(titles, known, store=store, look_up=look_up)
        if store:
            self.end_conversation()
            self.weights.have_written()
        self.last = {}
        with self.writer.at(reader):
            found: list[Tensor] = reader.read_all(texts, losses=losses, progress=progress)
            return found

    def _reader(self, titles: list[str | None], known: Document | None, *, store: bool, look_up: bool) -> Any:
        documents, options = SideBySide(self.contents, titles, known), cast(Any, self.options)
        if self.recall is None:
            return Reader(self.model, options, documents, store=store, look_up=look_up)
        return SpanReader(self.model, options, self.recall, documents, store=store, look_up=look_up)

    def _document_to_go_on_with(self, number: int, tokens: int) -> Document:
        known = self.contents.last_document()
        if known is None or known.number != number or tokens < known.tokens:
            raise ValueError(f"expected more of the last document in the only row, {known}, got document {number}")
        return known

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Inside, another memory may take the place of this one. Raises ValueError where it must not."""
        self.expect_attached()
        self.expect_writable()
        if self.writer.now is not None:
            raise ValueError("expected a call of the model inside writing(), got another memory")
        with self.lock, torch.inference_mode(False):
            yield
            self.last = {}

    def loaded(self, path: str | Path, *, mmap: bool, verify: bool | None, other_weights: bool) -> KNNMemoryList:
        """See `AttachedMemory.load`."""
        device = self.contents.memories()[0].device
        mmap, directory = mmap and device.type == "cpu", self.options.directory
        loaded = KNNMemoryList.load(path, mmap=mmap, verify=verify, device=device, directory=directory)
        if not other_weights:
            self.weights.check(loaded.fingerprint, loaded.extra.get("model"), name_of(self.model))
        return loaded

    def merge(self, path: str | Path) -> None:
        """See `AttachedMemory.merge`."""
        with self.replacing():
            if self.contents.ledger:
                self.weights.refuse_others()
            added = self.contents.parts_to_merge(self.loaded(path, mmap=True, verify=True, other_weights=False))
            self.end_conversation()
            self.contents.merge(added)
            self.weights.have_written()

    def expect_attached(self) -> None:
        if not self.is_attached:
            raise ValueError("expected an attached memory, got one that detach() has taken away")

    def expect_writable(self) -> None:
        if not self.writable.now:
            raise ValueError("expected a memory that may be written, got one inside read_only()")
