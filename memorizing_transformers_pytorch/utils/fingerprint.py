"""Whether the weights of a model are those that wrote a memory: other weights make other keys, which do not fit."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 16  # numbers of each parameter


class Weights:
    """The weights of a model, apart from parameters with `ignored` in their names (if any), and which of them wrote.

    Adapters (PEFT) count, and whether they are switched on.
    """

    def __init__(self, model: nn.Module, ignored: str | None = None) -> None:
        self._model, self._ignored = model, ignored
        self._written_by: str | None = None
        self._seen: tuple[Any, ...] | None = None

    def have_written(self) -> None:
        """Note that what is remembered now was written by the weights as they are."""
        self._written_by, self._seen = self.fingerprint(), self._state()

    def were_written_by(self, fingerprint: str | None) -> None:
        """Note that what is remembered now was written by weights with this fingerprint."""
        self._written_by, self._seen = fingerprint, None

    @property
    def written_by(self) -> str | None:
        """The fingerprint of those that have written; None if none have."""
        return self._written_by

    def refuse_others(self) -> None:
        """Raises ValueError if they are not those that have written."""
        if self.fingerprint() != self._written_by:
            raise ValueError("expected the weights that have read what is remembered, got others: clear() it first")

    def warn_of_others(self) -> None:
        """Warns, once for each change, if they are not those that have written. Takes no time otherwise."""
        if self._seen != (state := self._state()):
            self._seen = state
            if self.fingerprint() != self._written_by:
                warnings.warn(
                    "the weights have changed since they read what is remembered: it fits badly", stacklevel=3
                )

    def fingerprint(self) -> str:
        """Of some numbers of each parameter: another one if they have changed."""
        found = hashlib.sha256(repr(list(self._switches())).encode())
        for name, parameter in self._parameters():
            flat = parameter.detach().flatten()
            places = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLED, len(flat)), dtype=torch.float64).long()
            found.update(f"{name} {tuple(parameter.shape)} {flat[places.to(flat.device)].tolist()}".encode())
        return found.hexdigest()

    def _state(self) -> tuple[Any, ...]:
        """Something that is another whenever weights may have changed in place, and takes no time."""
        return sum(_version(parameter) for _, parameter in self._parameters()), *self._switches()

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self._model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if self._ignored is None or self._ignored not in f"{prefix}.{name}":
                    yield f"{prefix}.{name}", _kept(module, name, parameter)

    def _switches(self) -> Iterator[tuple[Any, ...]]:
        for module in self._model.modules():
            names = getattr(module, "active_adapters", None)
            if names is not None and not callable(names) and hasattr(module, "disable_adapters"):
                yield str(names), bool(module.disable_adapters), str(getattr(module, "scaling", ""))


def _kept(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The parameter; of one that FSDP has spread, the part of this process; of one on "meta", what accelerate keeps of
    it elsewhere until it is needed."""
    if hasattr(parameter, "to_local"):
        own: Tensor = parameter.to_local()
        return own
    kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if parameter.device.type != "meta" or kept is None:
        return parameter
    found: Tensor = kept[name]
    return found


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
