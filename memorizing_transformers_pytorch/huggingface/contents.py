"""What the layers of a model remember, together: the same rows, documents and tokens.

Shapes: R rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memorizing_transformers_pytorch.huggingface.calls import Shared, State
from memorizing_transformers_pytorch.huggingface.layer import BaseLayer, Entries
from memorizing_transformers_pytorch.huggingface.models import name_of
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.memory.disk.manifest import MOST_COUNTED
from memorizing_transformers_pytorch.memory.ledger import Document, Ledger
from memorizing_transformers_pytorch.memory.moving import check_nothing_twice
from memorizing_transformers_pytorch.memory.policy import OLDEST

KIND = "attached to a Hugging Face model"
Titles = str | Sequence[str] | None
"""Of all documents, of each, or of none."""


class Passed(NamedTuple):
    """What has passed through the model, to be stored.

    rows: of the batch. entries: by layer. tokens: by document, how many more it has. offsets: by row, how many tokens
    it has read now. begun: by row, the title of a document that begins; they get the next numbers, in this order.
    """

    rows: list[int]
    entries: Mapping[int, Entries]
    tokens: Mapping[int, int]
    offsets: Mapping[int, int]
    begun: Mapping[int, str | None]


class Contents:
    """The memories of some layers. Either all of them change, or none."""

    def __init__(self, layers: Sequence[BaseLayer], shared: Shared) -> None:
        self.layers, self._shared = {layer.index: layer for layer in layers}, shared
        shared.state = self._empty(1, Ledger())

    @property
    def state(self) -> State:
        return self._shared.state

    @property
    def ledger(self) -> Ledger:
        return self.state.ledger

    @property
    def num_rows(self) -> int:
        return len(self.state.offsets)

    def _empty(self, rows: int, ledger: Ledger) -> State:
        """Of so many rows, in which nothing is remembered."""
        return State({index: layer.new_memories(rows) for index, layer in self.layers.items()}, ledger, [0] * rows)

    def places_of(self, rows: int) -> tuple[list[int], list[int]]:
        """Which rows of the memory a batch of so many texts reads, and how many tokens each text has before it. An
        empty memory of other rows, which gets these as soon as something is stored, is read through its first row.

        Raises ValueError for other rows than those of what is remembered.
        """
        if rows == self.num_rows:
            return list(range(rows)), list(self.state.offsets)
        if self.ledger:
            raise ValueError(f"expected the {self.num_rows} rows of what is remembered, got {rows}: clear() it first")
        return [0], [0] * rows

    def store(self, num_rows: int, passed: Passed) -> None:
        """Store what has passed through the model in a batch of so many rows. Raises ValueError, changing nothing, for
        what cannot be stored."""
        state = self.state if num_rows == self.num_rows else self._empty(num_rows, self.ledger)
        staged = []
        for index, each in passed.entries.items():
            if bool(each.mask.any()):
                layer, memories = self.layers[index], state.memories[index]
                staged.append((layer, memories, layer.stage(memories, each, passed.rows)))
        with KNNMemoryList(each for memories in state.memories.values() for each in memories).locked():
            self._shared.state = state
            for row, title in passed.begun.items():
                self._begin(row, title)
            for layer, memories, entries in staged:
                layer.commit(memories, entries)
            for number, tokens in passed.tokens.items():
                self.ledger.grow(number, tokens)
            offsets = [passed.offsets.get(row, known) for row, known in enumerate(state.offsets)]
            self._shared.state = state._replace(offsets=offsets)
            self._demote(passed.offsets)

    def _begin(self, row: int, title: str | None) -> None:
        """Begin a document in this row. Documents without any entries left are pruned."""
        layers = list(self.layers.values())
        if layers[0].options.policy == OLDEST:  # other policies choose for each layer
            layers = layers[:1]
        held = set().union(*(memory.store.numbers_in(row).tolist() for layer in layers for memory in layer.memories))
        self.ledger.prune(row, held)
        self.ledger.begin(title, row, self.state.offsets[row])

    def _demote(self, rows: Iterable[int]) -> None:
        """What stands too far behind where these rows are now."""
        for row in rows:
            for index, layer in self.layers.items():
                layer.demote(self.state.memories[index], row, self.state.offsets[row])

    def clear(self, rows: list[int]) -> None:
        """Forget what these rows hold."""
        with self._bare().locked():
            for memories in self.state.memories.values():
                for memory in memories:
                    memory.clear(rows)
            self.ledger.clear(rows)
            offsets = [0 if row in rows else known for row, known in enumerate(self.state.offsets)]
            self._shared.state = self.state._replace(offsets=offsets)

    def last_document(self) -> Document | None:
        """The document that was begun last in the only row, if it is there and has reached to where the row stands."""
        latest = self.ledger.latest(0) if self.num_rows == 1 else None
        known = None if latest is None else self.ledger[latest]
        return known if known and known.start + known.tokens == self.state.offsets[0] else None

    def memories(self) -> KNNMemoryList:
        """Those of all layers, one after the other, with the ledger."""
        memories = self._bare()
        sizes = [len(each) for each in self.state.memories.values()]
        extra = {"model": name_of(self._shared.model), "offsets": list(self.state.offsets), "memories": sizes}
        memories.extra = extra | self._arrangement()
        memories.marks = self.state.marks
        return memories

    def _bare(self) -> KNNMemoryList:
        state = self.state
        return KNNMemoryList((memory for each in state.memories.values() for memory in each), state.ledger)

    def forget(self, numbers: Sequence[int]) -> int:
        """As `KNNMemoryList.forget`."""
        return self._bare().forget(numbers)

    def save(self, path: str | Path, fingerprint: str | None, *, overwrite: bool, compact: bool) -> None:
        """As `KNNMemoryList.save`."""
        memories = self.memories()
        memories.fingerprint = fingerprint
        memories.save(path, overwrite=overwrite, compact=compact)
        self._shared.state = self.state._replace(marks=memories.marks)

    def _arrangement(self) -> dict[str, Any]:
        """Which layers have memories, and how what they hold is arranged."""
        arranged = [layer.arrangement for layer in self.layers.values()]
        return {"kind": KIND, "layers": list(self.layers), "arranged": arranged}

    def use(self, kept: State | None) -> None:
        """Remember what was kept, or nothing."""
        self._shared.state = self._empty(1, Ledger()) if kept is None else kept

    def as_state(self, loaded: KNNMemoryList) -> State:
        """What was loaded, to be used. Raises ValueError for memories of other layers."""
        extra, own, offsets = loaded.extra, self._arrangement(), loaded.extra.get("offsets")
        if (got := {name: extra.get(name) for name in own}) != own:
            advice = "attach with the options of attach_memory() that wrote it"
            raise ValueError(f"expected a memory of {_described(own)}, got one of {_described(got)}: {advice}")
        rest, memories = list(loaded), {}
        for index, layer in self.layers.items():
            count = len(layer.memories)
            memories[index], rest = rest[:count], rest[count:]
            layer.check_memories(memories[index])
        if len(loaded) != sum(len(layer.memories) for layer in self.layers.values()):
            raise ValueError(f"expected memories of {_described(own)}, got {len(loaded)}")
        if any(layer.holds_what_others_do for layer in self.layers.values()):
            rings = {(each.max_memories, each.policy, *each.store.filled, *each.store.cursors) for each in loaded}
            if len(rings) > 1:
                raise ValueError("expected the same tokens in each layer of the memory, got others")
        counts = offsets if isinstance(offsets, list) else []
        if {len(counts)} != {each.num_indices for each in loaded} or not all(
            type(each) is int and 0 <= each < MOST_COUNTED for each in counts
        ):
            raise ValueError(f"expected how many tokens each row has read, got {offsets}")
        return State(memories, loaded.ledger, counts, loaded.marks)

    def parts_to_merge(self, loaded: KNNMemoryList) -> State:
        """What `merge` takes. Raises ValueError as `as_state`, and for other rows."""
        check_nothing_twice(self._bare(), self.state.marks, loaded, loaded.marks)
        added = self.as_state(loaded)
        own = self._bare()[0]
        if loaded[0].num_indices != self.num_rows or loaded[0].dtype != own.dtype:
            raise ValueError(f"expected {self.num_rows} rows and {own.dtype}, got {loaded[0]}")
        return added

    def merge(self, added: State) -> None:
        """Add this as if it had been read long ago."""
        state, numbers = self.state, self.ledger.next_number
        with self._bare().locked():
            for index, layer in self.layers.items():
                for row, places in enumerate(state.offsets):
                    entries = layer.carried_over(added.memories[index], row, numbers, places)
                    state.memories[index][-1].commit(entries)
            self.ledger.merge(added.ledger, state.offsets)
            offsets = [before + more for before, more in zip(state.offsets, added.offsets, strict=True)]
            self._shared.state = state._replace(offsets=offsets)
            self._demote(range(self.num_rows))

    def close(self) -> None:
        """Forget everything."""
        for memory in self._bare():
            memory.cleanup()


def _described(arranged: Mapping[str, Any]) -> str:
    """How what some layers hold is arranged, for a message."""
    kinds = arranged["arranged"]
    kinds = sorted(set(map(str, kinds))) if isinstance(kinds, list) else [str(kinds)]
    of = "" if arranged["kind"] == KIND else f", {arranged['kind']}"
    return f"{' and '.join(kinds)} in layers {arranged['layers']}{of}"


def origins_of(numbers: Sequence[int], places: Tensor, tokens: Tensor) -> Tensor:
    """Documents (R), places in the row and tokens (R, N) -> (R, N, 3)."""
    return torch.stack((torch.tensor(numbers)[:, None].expand_as(tokens), places, tokens), dim=-1)


def checked_titles(titles: Titles, rows: int) -> list[str | None]:
    """A title for each of the documents. Raises ValueError for another number."""
    if titles is None or isinstance(titles, str):
        return [titles] * rows
    if not isinstance(titles, Sequence) or not all(title is None or isinstance(title, str) for title in titles):
        raise ValueError(f"expected titles as text, got {titles!r}")
    if len(titles) != rows:
        raise ValueError(f"expected a title for each of {rows} documents, got {len(titles)}")
    return list(titles)
