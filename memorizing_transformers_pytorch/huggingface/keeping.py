"""What an attached memory holds: which documents; forgetting, saving and loading them.

Shapes: R rows of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from memorizing_transformers_pytorch.huggingface.contents import Contents, Kept
from memorizing_transformers_pytorch.huggingface.segments import Segments
from memorizing_transformers_pytorch.huggingface.window import Window
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.memory.documents import DocumentTable
from memorizing_transformers_pytorch.memory.ledger import Document, Ledger
from memorizing_transformers_pytorch.memory.retrieved import Origin
from memorizing_transformers_pytorch.utils.fingerprint import Weights


class Keeping:
    """The half of `AttachedMemory` that runs no model."""

    def __init__(self, contents: Contents, weights: Weights, segments: Segments, window: Window | None) -> None:
        self._contents, self._weights, self._segments, self._window = contents, weights, segments, window
        self._attached, self._writable = True, True

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
        self._expect_attached()
        return sum(site.num_bytes for site in self._contents.sites)

    def documents(self) -> DocumentTable:
        """What was read since the rows were last cleared, and what is held of each document."""
        self._expect_attached()
        return self._contents.memories().documents()

    def entries(self, row: int, layer: int) -> Iterator[Origin]:
        """Where each entry of a row comes from, in the layer of this number, the oldest first: document number, place
        in the row and token id. Raises ValueError for a row or a layer that there is not."""
        self._expect_attached()
        sites = {site.index: site for site in self._contents.sites}
        if layer not in sites:
            raise ValueError(f"expected a layer with a memory among {list(sites)}, got {layer}")
        return chain.from_iterable(memory.entries(row) for memory in reversed(sites[layer].memories))

    def forget(
        self,
        document: int | str | Iterable[int | str] | None = None,
        *,
        where: Callable[[Document], bool] | None = None,
    ) -> int:
        """Remove every entry of some documents; see `KNNMemoryList.forget`. A chat that is going on ends."""
        self._expect_attached()
        if self._window is not None:
            self._window.end()
        return self._contents.forget(document, where)

    def save(self, path: str | Path, *, overwrite: bool = False, compact: bool = False) -> None:
        """Write what is remembered to a folder; see `KNNMemoryList.save`. (What was trained: `save_parameters`.) A chat
        that is going on ends."""
        self._expect_attached()
        if self._window is not None:
            self._window.end()
        self._contents.save(path, self._weights.written_by, overwrite=overwrite, compact=compact)

    def load(
        self, path: str | Path, *, mmap: bool = False, verify: bool | None = None, other_weights: bool = False
    ) -> None:
        """Remember what `save` has written, and nothing else; see `KNNMemoryList.load`.

        other_weights: also take what other weights than those of the model have read; it counts as theirs from then on.
        Raises ValueError, changing nothing, for what cannot be loaded or is not of these layers.
        """
        self._contents.use(self._loaded(path, mmap=mmap, verify=verify, other_weights=other_weights))
        self._weights.have_written()
        if self._window is not None:
            self._window.drop()

    def search_with(self, index: str) -> None:
        """Search what is remembered, apart from recent entries, like this from now on: what was loaded is searched as
        it was when it was saved. Raises ValueError for an unknown index."""
        self._expect_attached()
        for site in self._contents.sites:
            site.search_with(index)

    def exchange(self, kept: Kept | None) -> Kept:
        """Remember what was kept, or nothing, and give what was remembered until now, to be kept: several memories
        take turns with one model. Raises ValueError inside `writing()` and `read_only()`."""
        self._expect_attached()
        self._expect_writable()
        if self._segments.is_open:
            raise ValueError("expected a call of the model inside writing(), got another memory")
        if self._window is not None:
            self._window.end()
        before = self._contents.exchange(kept, self._weights.writer)
        self._weights.writer = None if kept is None else kept.writer
        return before

    def merge(self, path: str | Path) -> None:
        """Add what was saved by the same weights, with as many rows, as if it had been read before what is read next.

        Where the memory has entries at their true distances (`recent`), the added ones are older than those. What does
        not fit makes room for the rest. Raises ValueError as `load`, and if other weights have read what is remembered.
        """
        if self._contents.ledger:
            self._weights.refuse_others()
        if self._window is not None:
            self._window.end()
        self._contents.merge(self._loaded(path, mmap=True, verify=True, other_weights=False))
        self._weights.have_written()

    def _loaded(self, path: str | Path, *, mmap: bool, verify: bool | None, other_weights: bool) -> KNNMemoryList:
        self._expect_attached()
        self._expect_writable()
        if self._segments.is_open:
            raise ValueError("expected a call of the model inside writing(), got another memory")
        site = self._contents.sites[0]
        device, directory = site.memories[0].device, site.options.directory
        mmap = mmap and device.type == "cpu"
        loaded = KNNMemoryList.load(path, mmap=mmap, verify=verify, device=device, directory=directory)
        if not other_weights:
            self._weights.check(loaded.fingerprint)
        return loaded

    def clear(self, rows: int | Iterable[int] | None = None) -> None:
        """Forget what was read into these rows, or all. Raises ValueError for rows that there are not."""
        self._expect_attached()
        cleared = self._contents.rows_to_clear(rows)
        if self._window is not None:
            self._window.end() if len(cleared) < self.num_rows else self._window.drop()
        self._contents.clear(cleared)

    def _expect_attached(self) -> None:
        if not self._attached:
            raise ValueError("expected an attached memory, got one that detach() has taken away")

    def _expect_writable(self) -> None:
        if not self._writable:
            raise ValueError("expected a memory that may be written, got one inside read_only()")
