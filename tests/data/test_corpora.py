"""Documents: which files belong together, what is held out, and the split of enwik8."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from memorizing_transformers_pytorch.data import corpora
from memorizing_transformers_pytorch.data.corpora import Document, read_enwik8, split_by_name, standard_library


def test_the_standard_library_is_here_without_tests_and_installed_packages() -> None:
    documents = {document.name: document.text for document in standard_library()}
    assert len(documents) > 150
    assert "class JSONDecoder" in documents["json"]
    assert "class JSONEncoder" in documents["json"]
    assert not {"test", "site-packages", "idlelib"} & set(documents)


def test_a_document_is_a_top_level_package_or_module(tmp_path: Path) -> None:
    for name in ("b/two.py", "b/one.py", "b/tests/no.py", "a.py", "notes.txt", "test/no.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert standard_library(tmp_path) == [Document("a.py", "a.py"), Document("b", "b/one.py\n\nb/two.py")]


def test_bytes_that_are_no_utf8_do_not_stop_reading(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    assert standard_library(tmp_path) == [Document("latin.py", "# caf\N{REPLACEMENT CHARACTER}")]


def test_a_folder_without_python_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected Python files"):
        standard_library(tmp_path)


def test_a_document_stays_on_its_side_whatever_else_there_is() -> None:
    documents = [Document(f"module{number}", "") for number in range(1000)]
    train, valid = split_by_name(documents)
    assert sorted(train + valid) == sorted(documents)
    assert 60 < len(valid) < 140
    assert split_by_name(documents[::7])[1] == [document for document in valid if document in documents[::7]]


@pytest.fixture
def small_enwik8(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A hundredth of a thousandth of it."""
    monkeypatch.setattr(corpora, "ENWIK8_BYTES", 1000)
    monkeypatch.setattr(corpora, "ENWIK8_SPLIT", {"train": (0, 900), "valid": (900, 950), "test": (950, 1000)})
    return np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("zipped", [False, True])
def test_enwik8_is_split_in_order(tmp_path: Path, small_enwik8: bytes, zipped: bool) -> None:
    path = tmp_path / "enwik8"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("enwik8", small_enwik8)
    else:
        path.write_bytes(small_enwik8)
    split = read_enwik8(path)
    assert {name: len(part) for name, part in split.items()} == {"train": 900, "valid": 50, "test": 50}
    assert b"".join(part.tobytes() for part in split.values()) == small_enwik8


def test_anything_but_enwik8_is_refused(tmp_path: Path, small_enwik8: bytes) -> None:
    short = tmp_path / "short"
    short.write_bytes(small_enwik8[:-1])
    with pytest.raises(ValueError, match=r"expected 1,000 bytes of enwik8 in .*, got 999"):
        read_enwik8(short)
    with pytest.raises(ValueError, match="does not exist"):
        read_enwik8(tmp_path / "nothing")
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(ValueError, match="expected 'enwik8' in"):
        read_enwik8(other)
