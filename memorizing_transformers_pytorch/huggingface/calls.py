"""One call of a model with a memory, and what belongs to it alone.

Several threads may call one model at the same time. What a call is given, what its layers find and what they bring lies
in a `Call`, which layers reach through a context variable. So nothing of it is shared.

Shapes: B rows of the batch, R rows of the memory, H query heads, G key/value heads, T tokens of a call, S tokens with
those before them, K retrieved, D head width.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.memory import UNKNOWN, KNNMemory
from memorizing_transformers_pytorch.memory.disk.save import Marks
from memorizing_transformers_pytorch.memory.lease import Lookup
from memorizing_transformers_pytorch.memory.ledger import Ledger
from memorizing_transformers_pytorch.utils.context import PerContext
from memorizing_transformers_pytorch.utils.fingerprint import Writer

T = TypeVar("T")


def deepcopied(what: T, model: nn.Module, memo: dict[int, Any]) -> T:
    """A deep copy of something that belongs to a model, if the model is copied too. Copies of parts of the model, as
    PEFT makes them, share it."""
    if id(model) not in memo:
        return what
    memo[id(what)] = twin = object.__new__(type(what))
    for name, value in vars(what).items():
        object.__setattr__(twin, name, copy.deepcopy(value, memo))
    return twin


class Lock:
    """A lock that a thread that holds it can take again. A copy is a lock that nobody holds."""

    def __init__(self) -> None:
        lock = threading.RLock()
        self.acquire, self.release = lock.acquire, lock.release

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


class State(NamedTuple):
    """What is remembered: the memories of each layer, the documents in them, how many tokens each row has read, where
    it was saved last, and, while it is not in use, which weights wrote it.

    It is replaced as a whole, so that a call that begins meanwhile sees all of the old state or all of the new one.
    """

    memories: dict[int, list[KNNMemory]]
    ledger: Ledger
    offsets: list[int]
    marks: Marks | None = None
    writer: Writer | None = None


@dataclass(eq=False)
class Shared:
    """What the layers of a model share: what is remembered, and the call that is running in this thread or task."""

    model: nn.Module
    state: State
    call: PerContext[Call | None] = field(default_factory=lambda: PerContext(None))


@dataclass(eq=False)
class Found:
    """What one layer found in a call: in each of its memories, or None where nothing was to be found.

    memories: those that held something. counts: how many entries they held in each row of the call. weights: the
    attention on what was found (B, H, T, K), if the call keeps it.
    """

    memories: list[KNNMemory | None]
    counts: list[list[int]]
    lookups: list[Lookup | None]
    weights: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return all(memory is None for memory in self.memories)

    def origins(self) -> Tensor | None:
        """(R, H, T, K, 3), -1 where nothing was found; None if nothing was looked up."""
        found = [lookup.origins() for lookup in self.lookups if lookup is not None]
        return torch.cat(found, dim=-2) if found else None


@dataclass(eq=False)
class Call:
    """given: the arguments of the model, by name. memories: of each layer, when the call began.

    rows: those of the memory that the batch reads; each serves as many rows of the batch, one after the other.
    offsets: how many tokens come before the batch, for each of these rows, or for each row of the batch. enabled:
    whether the memory is looked up. keeps_pairs, keeps_weights: whether layers leave behind what is to be stored, and
    the weights of what they found. writer: what stores it. module: what was called.

    prefix, recalled: passages before the text, and what was found for them in this call. drops_cache: whether the cache
    was made for these alone. is_kept: whether what it brings leaves the cache for the memory.

    By number of the layer: pairs (keys and values (B, G, T, D); keys are turned to where they stand), found, and
    position_embeddings, which the layer was given.
    """

    given: dict[str, Any]
    memories: Mapping[int, list[KNNMemory]]
    rows: list[int]
    offsets: list[int]
    enabled: bool
    keeps_pairs: bool = False
    keeps_weights: bool = False
    writer: Any = None
    module: nn.Module | None = None
    prefix: Any = None
    recalled: list[Any] | None = None
    drops_cache: bool = False
    is_kept: bool = False
    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    found: dict[int, Found] = field(default_factory=dict)
    position_embeddings: dict[int, Any] = field(default_factory=dict)

    @property
    def cache(self) -> Any:
        """What the model keeps of earlier calls."""
        return self.given.get("past_key_values")

    @cached_property
    def before(self) -> int:
        """How many tokens the cache has seen."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        tokens = self.given.get("input_ids")
        given = self.given["inputs_embeds"] if tokens is None else tokens
        return len(given), given.shape[1]

    # Copies on the CPU, for which a GPU must wait: they are made only where they are needed.

    @cached_property
    def tokens(self) -> Tensor:
        """(B, T) int64."""
        tokens = self.given.get("input_ids")
        return torch.full(self.shape, UNKNOWN) if tokens is None else tokens.detach().cpu().long()

    @cached_property
    def places(self) -> Tensor:
        """(B, T) int64, the positions that the model gives to the tokens."""
        places = self.given.get("position_ids")
        if not isinstance(places, Tensor) or places.ndim != 2:
            places = torch.arange(self.before, self.before + self.shape[1])[None]
        return places.cpu().expand(self.shape).long()

    @cached_property
    def mask(self) -> Tensor:
        """(B, T) bool, False for padding."""
        mask = self.given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask[:, : self.before + self.shape[1]][:, -self.shape[1] :].bool().cpu()
        return torch.ones(self.shape).bool()

    def check_rows(self) -> None:
        """Raises ValueError for a batch that the rows of the memory cannot serve."""
        if self.shape[0] % len(self.rows):
            expected = f"a batch that is a multiple of the {len(self.rows)} rows of the memory"
            raise ValueError(f"expected {expected}, got {self.shape[0]}")

    def check_order(self) -> None:
        """Raises ValueError for several documents in one row: positions that begin anew."""
        known = torch.where(self.mask, self.places, -1).cummax(dim=1).values
        if bool((self.mask[:, 1:] & (self.places[:, 1:] <= known[:, :-1])).any()):
            raise ValueError(
                "position_ids begin anew within a row: several documents in one row cannot be stored; "
                "give each document a row of its own"
            )


@dataclass(eq=False)
class WatchedRow:
    """A row of the memory, how many tokens it had read when the last call began, and what each layer found in that."""

    row: int
    place: int = 0
    found: dict[int, Found] = field(default_factory=dict)


def refuse_in_backward() -> None:
    """Raises ValueError inside a backward pass: a search then would find something else than the forward pass has."""
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "a model with a memory runs again in a backward pass, and it is not known for which call: use "
            "model.gradient_checkpointing_enable() instead of wrapping the model or its layers in checkpoint()"
        )


def runs_inside(*names: str) -> bool:
    """Whether one of these functions of transformers' `generate` is running in this thread."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name in names and "transformers.generation" in frame.f_globals.get("__name__", ""):
            return True
    return False
