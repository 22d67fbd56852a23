"""How a memory is attached to a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from memorizing_transformers_pytorch.memory.policy import OLDEST, POLICIES

LEAST = {"topk": 1, "distance": 0, "recent": 1, "max_memories": 1, "chunk": 1, "skip_first": 0, "window": 0}
OPTIONAL = ("recent", "window")
CHOICES = {
    "combine": ("softmax", "gate"),
    "positions": ("true", "constant"),
    "write": ("read", "window"),
    "policy": POLICIES,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `attach_memory`."""

    topk: int = 32
    combine: str = "softmax"
    positions: str = "true"
    distance: int = 1_024
    recent: int | None = None
    max_memories: int = 262_144
    chunk: int = 512
    skip_first: int = 4
    write: str = "read"
    window: int | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    index: str = "auto"
    policy: str = OLDEST
    directory: str | Path | None = None

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if type(value) is not int:
                raise ValueError(f"expected {name} to be a whole number, got {value!r}")
            if value < least:
                raise ValueError(f"expected {name} to be at least {least}, got {value}")
        if self.skip_first >= self.chunk:
            raise ValueError(f"expected skip_first to be below chunk={self.chunk}, got {self.skip_first}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"expected {name} to be one of {choices}, got {getattr(self, name)!r}")
        if (self.write == "window") != (self.window is not None) or (self.window is not None and self.window < 2):
            raise ValueError(f"expected a window of at least 2 with write='window' alone, got {self.window}")
