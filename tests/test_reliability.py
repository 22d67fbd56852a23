"""Each promise of docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text("utf-8")
PROMISES = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| ")]
PROMISES = [(promise.strip(), tests) for promise, tests in (cells for cells in PROMISES if len(cells) == 2)][1:]
FUNCTIONS = {
    name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
}


@pytest.mark.parametrize(("promise", "tests"), PROMISES, ids=[promise[:40] for promise, _ in PROMISES])
def test_a_promise_names_tests_that_exist(promise: str, tests: str) -> None:
    names = re.findall(r"`([^`]+)`", tests)
    assert names
    for name in names:
        if name.startswith("test_"):
            start = name.removesuffix("...")
            assert any(each == name or (name != start and each.startswith(start)) for each in FUNCTIONS), name
        elif not name.startswith(("make ", "-m ", "KILLS")):
            assert (ROOT / name).exists(), name
