"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from memorizing_transformers_pytorch.utils.durable import replacing, verify, write_checksums


def test_a_file_is_replaced_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as aside:
            aside.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_checksums_hold_until_a_file_changes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    (tmp_path / "b").write_text("c")
    verify(tmp_path, "a")
    for changed in ("b", "missing"):
        with pytest.raises(ValueError, match=rf"expected whole files in .*{changed}"):
            verify(tmp_path, "a", changed)
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(ValueError, match="expected whole files"):
        verify(tmp_path, "a")
