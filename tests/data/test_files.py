"""Files: which of them are read, which belong together, and which are refused."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from memorizing_transformers_pytorch.data import files
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import TextDocument
from memorizing_transformers_pytorch.data.prepare import open_corpus


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def read(source: Path | str, **options: object) -> list[TextDocument]:
    return list(open_corpus(DataConfig(source=str(source), **options)))  # type: ignore[arg-type]


def test_the_standard_library_is_here_without_tests_and_installed_packages() -> None:
    documents = {document.name: document.text for document in read("stdlib")}
    assert len(documents) > 150
    assert "class JSONDecoder" in documents["json"]
    assert "class JSONEncoder" in documents["json"]
    assert not {"test", "site-packages", "idlelib"} & set(documents)


def test_a_document_of_the_library_is_a_top_level_package_or_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "b/two.py", "b/one.py", "b/tests/no.py", "a.py", "notes.txt", "test/no.py")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read("stdlib") == [TextDocument("a.py", "a.py"), TextDocument("b", "b/one.py\n\nb/two.py")]


def test_a_folder_gives_a_document_for_each_file_but_hidden_ones(tmp_path: Path) -> None:
    write(tmp_path, "b/two.txt", "a.md", "b/.hidden", ".git/config", "b-c.txt")
    assert read(tmp_path) == [TextDocument(name, name) for name in ("a.md", "b/two.txt", "b-c.txt")]
    assert [document.name for document in read(tmp_path, pattern="*.txt")] == ["b/two.txt", "b-c.txt"]
    assert [document.name for document in read(tmp_path, pattern="b/*")] == ["b/two.txt"]


def test_a_folder_gives_a_document_for_each_entry_if_so_told(tmp_path: Path) -> None:
    write(tmp_path, "a/1", "a/2", "a-b", "c/d/e")
    found = read(tmp_path, group="folder")
    assert found == [TextDocument("a", "a/1\n\na/2"), TextDocument("a-b", "a-b"), TextDocument("c", "c/d/e")]


def test_a_glob_and_a_single_file_are_read(tmp_path: Path) -> None:
    write(tmp_path, "a/1.txt", "a/2.md", "b/3.txt")
    assert [document.name for document in read(tmp_path / "*" / "*.txt")] == ["a/1.txt", "b/3.txt"]
    assert [document.name for document in read(tmp_path / "**" / "*.md")] == ["a/2.md"]
    assert read(tmp_path / "a" / "1.txt") == [TextDocument("1.txt", "a/1.txt")]


def test_they_can_be_read_again(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    corpus = open_corpus(DataConfig(source=str(tmp_path)))
    assert list(corpus) == list(corpus) == [TextDocument("a", "a"), TextDocument("b", "b")]


def test_the_fingerprint_changes_with_any_file(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    config = DataConfig(source=str(tmp_path))
    prints = {open_corpus(config).fingerprint(), open_corpus(config).fingerprint()}
    assert len(prints) == 1
    os.utime(tmp_path / "b", ns=(1, 1))
    prints.add(open_corpus(config).fingerprint())
    (tmp_path / "b").write_text("longer")
    os.utime(tmp_path / "b", ns=(1, 1))
    prints.add(open_corpus(config).fingerprint())
    write(tmp_path, "c")
    prints.add(open_corpus(config).fingerprint())
    assert len(prints) == 4


def test_bytes_that_are_no_utf8_are_replaced_or_refused_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"# caf\xe9")
    assert read(tmp_path) == [TextDocument("latin", "# caf\N{REPLACEMENT CHARACTER}")]
    with pytest.raises(ValueError, match=r"expected UTF-8 in .*latin, got byte 0xe9 at offset 5"):
        read(tmp_path, errors="strict")


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes(b"\xef\xbb\xbfone \xef\xbb\xbf")
    assert read(tmp_path) == [TextDocument("notes", "one \N{ZERO WIDTH NO-BREAK SPACE}")]
    (tmp_path / "notes").write_bytes(b"\xef\xbb\xbfone \xe9")
    with pytest.raises(ValueError, match="byte 0xe9 at offset 7"):
        read(tmp_path, errors="strict")


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dos").write_bytes(b"one\r\ntwo\r")
    assert read(tmp_path)[0].text == "one\r\ntwo\r"


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"expected files that match '\*' in .*, got none"):
        read(tmp_path)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(ValueError, match=r"expected text, got the binary file '.*image.png'"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"expected a source that is .*, got 'nowhere'"):
        read("nowhere")
    corpus = open_corpus(DataConfig(source=str(tmp_path)))
    (tmp_path / "image.png").unlink()
    with pytest.raises(ValueError, match=r"expected a readable file, got '.*image.png': No such file"):
        list(corpus)
    error = PermissionError(13, "Permission denied", "locked")
    with pytest.raises(ValueError, match="expected a readable folder, got 'locked': Permission denied"):
        files._refuse(error)
