"""Whether the weights of a model are those that wrote a memory: other weights make other keys, which do not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

SAMPLED = 16  # numbers of each parameter


class Weights:
    """The weights of a model, apart from the parameters with `ignored` in their names.

    Adapters (PEFT) count, and whether they are switched on.
    """

    def __init__(self, model: nn.Module, ignored: str) -> None:
        self._model, self._ignored = model, ignored

    def fingerprint(self) -> str:
        """Of some numbers of each parameter: another one if they have changed."""
        found = hashlib.sha256(repr(list(self._switches())).encode())
        for name, parameter in self._parameters():
            flat = parameter.detach().flatten()
            places = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLED, len(flat)), dtype=torch.float64).long()
            found.update(f"{name} {tuple(parameter.shape)} {flat[places.to(flat.device)].tolist()}".encode())
        return found.hexdigest()

    def state(self) -> tuple[Any, ...]:
        """Something that is another whenever weights may have changed in place, and takes no time."""
        return sum(_version(parameter) for _, parameter in self._parameters()), *self._switches()

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, each) for name, each in self._model.named_parameters() if self._ignored not in name)

    def _switches(self) -> Iterator[tuple[Any, ...]]:
        for module in self._model.modules():
            names = getattr(module, "active_adapters", None)
            if names is not None and not callable(names) and hasattr(module, "disable_adapters"):
                yield str(names), bool(module.disable_adapters), str(getattr(module, "scaling", ""))


def _version(parameter: nn.Parameter) -> int:
    return 0 if parameter.is_inference() else parameter._version
