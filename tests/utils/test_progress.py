"""Bars: often on a terminal, seldom in a log file."""

from __future__ import annotations

import sys

import pytest

from memorizing_transformers_pytorch.utils.progress import bar


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.1), (False, 10)])
def test_a_log_file_is_not_filled_with_bars(monkeypatch: pytest.MonkeyPatch, terminal: bool, seconds: float) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with bar(total=3, desc="reading", disable=False) as shown:
        assert (shown.mininterval, shown.total, shown.desc) == (seconds, 3, "reading")
    assert list(bar("abc")) == ["a", "b", "c"]
