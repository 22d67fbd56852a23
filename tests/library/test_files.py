"""A memory that is built from files holds what the files say now: nothing stays of a text that is gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers_pytorch.data.texts import files_below
from memorizing_transformers_pytorch.library.build import Builder, Outcome
from memorizing_transformers_pytorch.library.readers import RunReader, open_reader
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.utils.interrupts import StopRequest
from tests.library.conftest import make_run
from tests.library.test_memory_command import picture, run, told

SECRET = "the door code is 1234. " * 3


class Library:
    """A folder of texts and the memory that is built from it, in RAM."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        reader = open_reader(str(make_run(folder / "run", **changes)), "cpu", max_memories=None, dtype=None, index=None)
        assert isinstance(reader, RunReader)
        self.reader, self.texts = reader, folder / "texts"
        self.texts.mkdir()
        self.write("private.txt", SECRET)
        self.write("other.txt", "other text. " * 3)
        self.build()

    def write(self, name: str, text: str) -> Path:
        path = self.texts / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def build(self, *sources: Path, prune: bool = False) -> Outcome:
        files = files_below([str(each) for each in sources or [self.texts]], "*", may_be_none=prune)
        builder = Builder(self.reader, lambda: None, 99, StopRequest())
        return builder.build(files, lambda name, size: None, prune=prune)

    def titles(self) -> list[str]:
        return sorted(os.path.relpath(each.title, self.texts) for each in self.reader.memory.documents())

    def says(self, text: str) -> bool:
        """Whether the memory holds these tokens, one after the other."""
        held = bytes(each.token for each in self.reader.memory.entries(0))
        return text.encode() in held


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("data", [b"", b" \n", b"\0PNG", b"caf\xe9"], ids=["empty", "blank", "binary", "latin-1"])
def test_nothing_stays_of_a_file_that_is_no_longer_text(library: Library, data: bytes, prune: bool) -> None:
    assert library.says("1234")
    (library.texts / "private.txt").write_bytes(data)
    outcome = library.build(prune=prune)
    assert (library.titles(), library.says("1234"), library.says("other text")) == (["other.txt"], False, True)
    assert outcome.removed == [str(library.texts / "private.txt")] == list(outcome.skipped)
    assert library.build().removed == []


@pytest.mark.parametrize("prune", [False, True])
def test_a_file_that_cannot_be_opened_is_removed_by_prune_and_named_otherwise(
    library: Library, prune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, read = library.texts / "private.txt", Path.read_bytes

    def refusing(path: Path) -> bytes:
        if path == private:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    outcome = library.build(prune=prune)
    assert library.says("1234") == (not prune)
    assert (outcome.kept, outcome.removed) == (([], [str(private)]) if prune else ([str(private)], []))
    assert f"skipped {private}: Permission denied" in outcome.messages("")
    assert any("is still in the memory (--prune removes it)" in line for line in outcome.messages("")) == (not prune)


def delete(private: Path) -> None:
    private.unlink()


def rename(private: Path) -> None:
    private.rename(private.with_name("renamed.txt"))


def hide(private: Path) -> None:
    private.rename(private.with_name(".private.txt"))


def swap_for_a_folder(private: Path) -> None:
    private.unlink()
    private.mkdir()
    (private / "public.txt").write_text("something else. " * 3)


def swap_for_a_broken_link(private: Path) -> None:
    private.unlink()
    private.symlink_to("nowhere")


def swap_for_a_pipe(private: Path) -> None:
    private.unlink()
    os.mkfifo(private)


@pytest.mark.parametrize("change", [delete, rename, hide, swap_for_a_folder, swap_for_a_broken_link, swap_for_a_pipe])
def test_a_file_that_is_gone_is_named_and_removed_by_prune(library: Library, change: Callable[[Path], None]) -> None:
    private = library.texts / "private.txt"
    change(private)
    outcome = library.build()
    assert (outcome.kept, outcome.removed) == ([str(private)], [])
    outcome = library.build(prune=True)
    assert (outcome.kept, outcome.removed) == ([], [str(private)])
    assert "private.txt" not in library.titles()
    assert library.says("1234") == (change is rename)


def test_prune_removes_everything_from_a_folder_that_was_emptied(library: Library) -> None:
    for path in library.texts.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no files match"):
        library.build()
    assert len(library.build(prune=True).removed) == 2
    assert (library.titles(), sum(library.reader.memory[0].num_entries)) == ([], 0)


def test_a_folder_that_was_swapped_for_a_file_keeps_none_of_its_texts(library: Library) -> None:
    deep = library.write("below/deep.txt", "deep secret. " * 3)
    library.build()
    deep.unlink()
    deep.parent.rmdir()
    library.write("below", "a file now. " * 3)
    assert library.build().kept == [str(deep)]
    assert library.build(prune=True).removed == [str(deep)]
    assert (library.titles(), library.says("deep secret")) == (["below", "other.txt", "private.txt"], False)


def test_a_link_that_leads_elsewhere_is_a_changed_file(library: Library, tmp_path: Path) -> None:
    targets = [tmp_path / name for name in ("v1", "v2")]
    for n, target in enumerate(targets):
        target.write_text(f"version {n}. " * 3)
    link = library.texts / "link.txt"
    link.symlink_to(targets[0])
    library.build()
    link.unlink()
    link.symlink_to(targets[1])
    assert library.build().changed == [str(link)]
    assert (library.says("version 0"), library.says("version 1")) == (False, True)
    assert library.build(library.texts, targets[0]).changed == []  # each file is itself, whatever led to it
    assert library.says("version 0")
    link.unlink()
    link.symlink_to(targets[0])
    assert library.build(library.texts, targets[1]).changed == []
    assert (library.says("version 0"), library.says("version 1")) == (True, True)


def test_a_file_that_was_swapped_for_a_link_is_a_changed_file(library: Library, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("something else. " * 3)
    private = library.texts / "private.txt"
    private.unlink()
    private.symlink_to(tmp_path / "elsewhere")
    assert library.build().changed == [str(private)]
    assert (library.says("1234"), library.says("something else")) == (False, True)


def test_documents_before_a_token_that_clears_the_memory_are_not_listed(tmp_path: Path) -> None:
    library = Library(tmp_path, clear_memories_on_eos_token_id=ord("!"), xl_max_memories=0)
    library.write("p.txt", "before! and after it")
    library.build()
    assert (library.titles(), library.says("after it"), library.says("before")) == (
        ["p.txt", "private.txt"],  # the second was read again
        True,
        False,
    )
    library.write("p.txt", "it ends here!")
    assert len(library.build().changed) == 1
    assert (library.titles(), library.says("after it")) == (["private.txt"], False)
    library.write("private.txt", "private, too!")
    library.write("other.txt", "and other!")
    assert library.build(prune=True).removed == []
    assert library.titles() == []


def test_the_command_says_what_it_skipped_removed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, texts, memory = make_run(tmp_path / "run"), tmp_path / "texts", tmp_path / "memory"
    texts.mkdir()
    for name in ("emptied", "gone", "left"):
        (texts / name).write_text(f"{name} text. " * 3)
    build = ("build", memory, texts, "--model", model)
    assert told(capsys, *build)["read"] == 3
    (texts / "emptied").write_text("")
    (texts / "gone").unlink()
    run(*build)
    said = capsys.readouterr().err
    assert f"skipped {texts / 'emptied'}: empty file\n" in said
    assert f"removed from the memory: {texts / 'emptied'}\n" in said
    assert f"{texts / 'gone'} is still in the memory (--prune removes it)" in said
    (texts / "left").unlink()
    result = told(capsys, *build, "--prune")
    assert (result["removed"], result["kept"], result["skipped"], result["documents"]) == (2, 0, 1, 0)
    held = b"".join(data for data in picture(memory).values() if data)
    assert not any(name in held for name in (b"emptied", b"gone", b"left"))
    assert sum(KNNMemoryList.load(memory)[0].num_entries) == 0
