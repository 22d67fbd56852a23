"""How much is tried: some of it in `make test`, more in `make soak`, which runs with SOAK=1."""

from __future__ import annotations

import os

SOAKING = os.environ.get("SOAK") == "1"


def some(quickly: int, soaking: int) -> int:
    return soaking if SOAKING else quickly
