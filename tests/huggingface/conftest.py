"""No test writes into the cache of the user."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    layers = pytest.importorskip("memorizing_transformers_pytorch.huggingface.layers")
    monkeypatch.setattr(layers, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"
