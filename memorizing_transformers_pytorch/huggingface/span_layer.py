"""What a memory of spans keeps of each token: keys and values of every layer, or nothing but the finder's key.

Keys are kept at position 0. Shapes: R rows of the memory, G key/value heads, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.huggingface.calls import Shared
from memorizing_transformers_pytorch.huggingface.finder import Finder
from memorizing_transformers_pytorch.huggingface.layer import BaseLayer, Shape, StoreOptions
from memorizing_transformers_pytorch.huggingface.models import check_ids, vocabulary_of
from memorizing_transformers_pytorch.huggingface.probe import Layer
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.store import Store

CONTENTS = ("kv", "tokens")
FINDERS = ("head", "bm25", "both")
PAIRS, KEYS, NOTHING = "spans", "keys of the finder", "token ids"  # how a layer is arranged


@dataclass(frozen=True, kw_only=True)
class SpanOptions(StoreOptions):
    """Those of `attach_memory` with retrieve="spans"."""

    content: str
    finder: str
    passages: int
    span: int
    first: int
    every: int
    overlap: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_numbers(passages=1, span=1, first=0, every=1, overlap=0)
        self.check_choices(content=CONTENTS, finder=FINDERS)
        if self.overlap >= self.chunk:
            raise ValueError(f"overlap must be below chunk={self.chunk}, got {self.overlap}")

    @property
    def budget(self) -> int:
        """How many positions passages take."""
        return self.first + self.passages * self.span


class SpanLayer(BaseLayer):
    """Keys and values of one layer of the model, or what else is kept of each token. It takes no part in a call."""

    options: SpanOptions
    holds_what_others_do = True

    @property
    def arrangement(self) -> str:
        return PAIRS

    def check_memories(self, memories: list[KNNMemory]) -> None:
        """Also raises ValueError for token ids that the model does not have. (In mapped files they are checked when
        they are used; words are all used at once.)"""
        super().check_memories(memories)
        for store in (memory.store for memory in memories):
            if store.mapped_from is None or self.options.finder != "head":
                for row, filled in enumerate(store.filled):
                    check_ids(store.origins[row, :filled, 2], vocabulary_of(self.shared.model), "the memory")


class FinderLayer(SpanLayer):
    """The key of the finder's head, in two halves, where pairs have a key and a value; without a finder, nothing."""

    head: int | None = None

    @property
    def arrangement(self) -> str:
        return NOTHING if self.head is None else f"{KEYS}, head {self.head}"


def options_for(arranged: object) -> dict[str, str] | None:
    """With which options of `attach_memory` a memory is made whose layers are arranged like this; None for one that is
    not of spans."""
    found = {
        PAIRS: {"content": "kv"},
        KEYS: {"content": "tokens"},
        NOTHING: {"content": "tokens", "finder": "bm25"},
    }
    return found.get(str(arranged[0]).partition(",")[0]) if isinstance(arranged, list) and arranged else None


def span_layers(
    layers: dict[int, Layer], finder: Finder | None, module: nn.Module, options: SpanOptions, shared: Shared
) -> list[BaseLayer]:
    """What keeps entries: a layer for each of these, or one for the finder, or for token ids alone.

    module: any of the model, where there is no finder.
    """
    if options.content == "kv":
        return [
            SpanLayer(
                number, each.module, Shape(each.kv_heads, each.width, torch.device("cpu"), each.dtype), options, shared
            )
            for number, each in layers.items()
        ]
    if finder is None:
        shape = Shape(1, 1, torch.device("cpu"), torch.bfloat16)
        return [FinderLayer(0, module, shape, options, shared)]
    shape = Shape(1, finder.width // 2, torch.device("cpu"), finder.layer.dtype)
    layer = FinderLayer(finder.head.layer, finder.layer.module, shape, options, shared)
    layer.head = finder.head.head
    return [layer]


def finder_keys(store: Store, row: int, kv_head: int | None) -> Callable[[slice], Tensor]:
    """The finder's keys in some places of a row, (n, D). kv_head: among those of its layer, None where it is the only
    thing that is kept."""
    if kv_head is not None:
        return lambda places: store.keys[row, kv_head, places].floats(torch.float32)
    return lambda places: torch.cat(
        [part[row, 0, places].floats(torch.float32) for part in (store.keys, store.values)], dim=-1
    )


def in_halves(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of the finder (R, N, D) -> as key and value (R, 1, N, D / 2)."""
    first, second = keys.unsqueeze(1).chunk(2, dim=-1)
    return first, second
