"""Detects whether a model still has the weights that wrote a memory: the keys of other weights do not fit its queries.

Within a process, PyTorch's version counters and the identity of each tensor tell cheaply whether weights changed. They
miss writes that PyTorch does not count: through `weight.data` (such as `weight.data.mul_(2)`), through NumPy, and to
inference tensors. A memory on disk carries a hash of all bytes, which misses nothing; `load` and `merge` compute it
anew.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PREFIX = "v2-"  # of a hash of all bytes; older fingerprints have none
UNKNOWN = f"{PREFIX}unknown"  # written by weights that changed before anybody asked for their hash
SAMPLED = 16  # numbers of each parameter in an older fingerprint
CHANGED = "model weights changed after this memory was written"
_ONE_AT_A_TIME = threading.Lock()  # threads that call one model; not in `Weights`, which can be pickled


class Writer(NamedTuple):
    """Which weights wrote a memory: the state that `Weights` gave them, and their fingerprint, if it was computed."""

    state: tuple[Any, ...] | None
    fingerprint: str | None


class Weights:
    """The weights of a model, and which weights wrote its memory: `writer`, None if none did.

    Weights are all parameters and persistent buffers, except those in modules with `ignored` in their names. Adapters
    (PEFT) count, and whether they are switched on.
    """

    def __init__(self, model: nn.Module, ignored: str | None = None) -> None:
        self.writer: Writer | None = None
        self._model, self._ignored = model, ignored
        self._snapshot: _Snapshot | None = None
        self._changes = 0
        self._hash: tuple[int, str] | None = None  # of the tensors after so many changes
        self._warned: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. Another process, or a copy of the model, has other tensors: only hashes compare."""
        writer = None if self.writer is None else Writer(None, self.written_by)
        return self.__dict__ | {"writer": writer, "_snapshot": None, "_hash": None, "_warned": None}

    def have_written(self) -> None:
        """Note that the current weights wrote the memory."""
        state = self._state()
        self.writer = Writer(state, self._known(state))

    @property
    def written_by(self) -> str | None:
        """The fingerprint of the weights that wrote the memory; None if none did."""
        if self.writer is not None and self.writer.fingerprint is None:
            if self._state() != self.writer.state:
                return UNKNOWN
            self.writer = Writer(self.writer.state, self.fingerprint())
        return None if self.writer is None else self.writer.fingerprint

    def refuse_others(self) -> None:
        """Raises ValueError if the current weights are not those that wrote the memory."""
        if self._are_others(self._state()):
            raise ValueError(f"{CHANGED}. Clear the memory first.")

    def warn_of_others(self) -> None:
        """Warns, once for each change, if the current weights are not those that wrote the memory."""
        state = self._state()
        if state != self._warned and self._are_others(state):
            self._warned = state
            advice = "retrieval may be worse. Clear the memory, or pass other_weights=True."
            warnings.warn(f"{CHANGED}; {advice}", stacklevel=2)

    def check(self, fingerprint: str | None, writer: object = None, own_name: str | None = None) -> None:
        """Raises ValueError if a memory with this fingerprint was written by other weights. None fits any.

        writer, own_name: names of the model that wrote it and of this one, for the message.

        Reads all weights. Also accepts the fingerprints of earlier releases, which sampled the weights.
        """
        if fingerprint is None:
            return
        self._hash = None
        own = self.fingerprint() if fingerprint.startswith(PREFIX) else self._sampled()
        if fingerprint != own:
            theirs, mine = (f"{name}, " if name else "" for name in (writer, own_name))
            got = f"this memory was written by other weights ({theirs}fingerprint {fingerprint}); the model in use has"
            raise ValueError(f"{got} ({mine}{own}). Use the model that wrote it, or pass other_weights=True.")

    def fingerprint(self) -> str:
        """A hash of all bytes. Reads the weights only if they changed since the last call."""
        state = self._state()
        if (known := self._known(state)) is None:
            self._hash = self._changes, _hash_of(self._current.named)
            known = self._known(state)
        assert known is not None
        return known

    def _known(self, state: tuple[Any, ...]) -> str | None:
        if self._hash is None or self._hash[0] != state[0]:
            return None
        return PREFIX + hashlib.sha256(f"{self._hash[1]} {state[1:]}".encode()).hexdigest()

    def _are_others(self, state: tuple[Any, ...]) -> bool:
        if self.writer is None:
            return True
        if state != self.writer.state:
            if self.writer.fingerprint is None or self.fingerprint() != self.writer.fingerprint:
                return True
            self.writer = Writer(state, self.writer.fingerprint)
        return False

    @property
    def _current(self) -> _Snapshot:
        with _ONE_AT_A_TIME:
            if self._snapshot is None or not self._snapshot.holds():
                self._snapshot = _Snapshot(self._model, self._ignored)
                self._changes += 1
            return self._snapshot

    def _state(self) -> tuple[Any, ...]:
        """How often the tensors changed, and the switches of adapters: equal if the weights are the same. Cheap."""
        switches = self._current.switches()  # first, as this counts changes
        return self._changes, *switches

    def _sampled(self) -> str:
        """The fingerprint as earlier releases computed it, from a few numbers of each parameter."""
        found = hashlib.sha256(repr([switches[:3] for switches in self._current.switches()]).encode())
        for prefix, module in self._model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if self._ignored is None or self._ignored not in f"{prefix}.{name}":
                    flat = _kept(module, name, getattr(parameter, "_local_tensor", parameter)).detach().flatten()
                    last, count = max(len(flat) - 1, 0), min(SAMPLED, len(flat))
                    places = torch.linspace(0, last, count, dtype=torch.float64).long().to(flat.device)
                    found.update(f"{prefix}.{name} {tuple(parameter.shape)} {flat[places].tolist()}".encode())
        return found.hexdigest()


class _Snapshot:
    """The tensors of a model as they were once.

    named: the weights with their names and modules, those that accelerate keeps elsewhere included.
    """

    def __init__(self, model: nn.Module, ignored: str | None) -> None:
        modules = [each for each in model.named_modules() if ignored is None or ignored not in each[0]]
        self.named = [
            (f"{prefix}.{name}", module, name, weight)
            for prefix, module in modules
            for name, weight in chain(module._parameters.items(), module._buffers.items())
            if weight is not None and name not in module._non_persistent_buffers_set
        ]
        self._switched = [module for _, module in modules if _is_switched(module)]
        here = [module for _, module in modules if _weights_map(module) is None]
        trees = [module._modules for _, module in modules] + [module._parameters for module in here]
        self._trees = [tree for tree in trees if tree]
        self._buffers = [module._buffers for _, module in modules if module._buffers]
        self._values, self._num_buffers = self._tree_values(), self._buffer_count()
        owned = [(module._buffers, name, weight) for _, module, name, weight in self.named if name in module._buffers]
        self._owned = [(owner, name, weight) for owner, name, weight in owned if not weight.is_meta]
        weights = [weight for _, module, _, weight in self.named if _weights_map(module) is None]
        self._parts = [part for weight in weights for _, part in _parts("", weight)]
        self._counted = [part for part in self._parts if not part.is_inference()]
        self._versions, self._addresses = self._numbers()

    def holds(self) -> bool:
        """Whether the model still has these tensors, and nothing was written to them."""
        return (
            len(values := self._tree_values()) == len(self._values)
            and all(map(is_, values, self._values))
            and self._buffer_count() == self._num_buffers
            and all(owner.get(name) is weight for owner, name, weight in self._owned)
            and self._numbers() == (self._versions, self._addresses)
        )

    def switches(self) -> tuple[tuple[str, bool, str, str], ...]:
        """Which adapters are active, whether they are off, their scales and which are merged, for each layer."""
        return tuple(
            (
                str(module.active_adapters),
                bool(module.disable_adapters),
                str(getattr(module, "scaling", "")),
                str(getattr(module, "merged_adapters", "")),
            )
            for module in self._switched
        )

    def _tree_values(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._trees)))

    def _buffer_count(self) -> int:
        return sum(map(len, self._buffers))

    def _numbers(self) -> tuple[list[int], list[int]]:
        return [part._version for part in self._counted], [part.data_ptr() for part in self._parts]


def _is_switched(module: Any) -> bool:
    names = getattr(module, "active_adapters", None)
    return names is not None and not callable(names) and hasattr(module, "disable_adapters")


def _weights_map(module: nn.Module) -> Any:
    """Where accelerate keeps the weights of a module until it runs; None if it has them itself."""
    return getattr(getattr(module, "_hf_hook", None), "weights_map", None)


def _kept(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The weight, also if accelerate keeps it elsewhere: then the module has only a stand-in on "meta"."""
    kept = _weights_map(module)
    found: Tensor = weight if kept is None or not weight.is_meta else kept[name]
    return found


def _parts(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor consists of: of torchao codes and scales, of FSDP the part of this process."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, inner), Tensor):  # FSDP also lists its mesh
            yield from _parts(f"{name}.{inner}", part)


def _hash_of(named: list[tuple[str, nn.Module, str, Tensor]]) -> str:
    """Of all bytes, names, shapes and dtypes. Several threads share the work: hashlib releases the GIL."""

    def digest(each: tuple[str, nn.Module, str, Tensor]) -> bytes:
        found = hashlib.sha256()
        for name, part in _parts(each[0], _kept(*each[1:])):
            found.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode())
            if not part.is_meta:
                found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return hashlib.sha256(b"".join(threads.map(digest, named))).hexdigest()
