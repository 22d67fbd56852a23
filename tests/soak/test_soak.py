"""Some seconds of what `make soak` does for an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.machine import Difference, Machine


@pytest.mark.parametrize("seed", range(0, 12, 4))
def test_memories_equal_plain_lists_whatever_is_done_to_them(seed: int, tmp_path: Path) -> None:
    for each in range(seed, seed + 4):
        machine = Machine(each, tmp_path)
        try:
            assert sum(1 for _ in machine.run(70)) == 70
        finally:
            machine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(1_000, 1_024, 8))
def test_memories_on_a_gpu_equal_plain_lists(seed: int, tmp_path: Path) -> None:
    for each in range(seed, seed + 8):
        machine = Machine(each, tmp_path, "cuda")
        try:
            assert sum(1 for _ in machine.run(100)) == 100
        finally:
            machine.close()


def test_a_difference_is_noticed(tmp_path: Path) -> None:
    machine = Machine(0, tmp_path)
    with pytest.raises(Difference, match="expected the plain lists"):  # noqa: PT012 (which operation does it is random)
        for _ in machine.run(50):
            machine.memories[1].store.tables["values"].add_(1)
    machine.close()
