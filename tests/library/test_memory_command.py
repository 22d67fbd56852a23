"""`memorizing-transformers memory`, with a model of a run and with one of transformers."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers_pytorch.cli import main
from memorizing_transformers_pytorch.cli import memory as cli_memory
from memorizing_transformers_pytorch.cli.generate import memories_of
from memorizing_transformers_pytorch.cli.options import memory as options_of
from memorizing_transformers_pytorch.cli.options.generate import Generate
from memorizing_transformers_pytorch.library.readers import DocumentReader, RunReader, open_reader
from memorizing_transformers_pytorch.memory import KNNMemory, KNNMemoryList
from memorizing_transformers_pytorch.memory.disk.manifest import NAME
from memorizing_transformers_pytorch.memory.index.approximate import ApproximateIndex
from memorizing_transformers_pytorch.utils.interrupts import Interrupted, StopRequest
from tests.library import conftest
from tests.library.conftest import make_hub_model
from tests.memory.test_disk import same

make_run = partial(conftest.make_run, segment_length=128)  # longer than that of others: it reads in fewer steps


def run(*arguments: object) -> None:
    main(["memory", *map(str, arguments)])


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    run(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "B/s]" not in each]
    return line


def picture(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below a folder, with what is in them."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def names(memory: Path) -> list[str]:
    return [Path(each.title).name for each in KNNMemoryList.load(memory).documents()]


def test_files_are_read_once_and_again_when_they_change(
    model: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = tmp_path / "memory"
    first = told(capsys, "build", memory, texts, "--model", model)
    assert (first["read"], first["unchanged"], first["skipped"], first["documents"]) == (3, 0, 2, 3)
    assert names(memory) == ["one.txt", "zlong.txt", "two.txt"]
    before = KNNMemoryList.load(memory)
    again = told(capsys, "build", memory, texts, "--model", model)
    assert (again["read"], again["unchanged"], again["changed"]) == (0, 3, 0)
    assert same(before, KNNMemoryList.load(memory))
    (texts / "one.txt").write_text("It was the worst of times. " * 8)
    (texts / "below" / "two.txt").unlink()
    changed = told(capsys, "build", memory, texts, "--model", model, "--prune")
    assert (changed["read"], changed["unchanged"], changed["changed"], changed["removed"]) == (0, 1, 1, 1)
    assert names(memory) == ["zlong.txt", "one.txt"]


def test_a_file_is_the_same_by_every_spelling_of_its_name(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, memory = make_run(tmp_path / "run"), tmp_path / "memory"
    (tmp_path / "link").symlink_to(texts, target_is_directory=True)
    assert told(capsys, "build", memory, "texts", texts, "link", "--model", model)["read"] == 3
    old = KNNMemoryList.load(memory)
    assert [each.title for each in old.documents()] == ["texts/one.txt", "texts/zlong.txt", "texts/below/two.txt"]
    old.ledger.note(old.documents()[0].number, {"file": "texts/one.txt"})  # as it was written before
    old.save(memory, compact=True)
    for spelling in (texts, "./texts", "link"):
        result = told(capsys, "build", memory, spelling, "--model", model, "--prune")
        assert (result["unchanged"], result["read"], result["removed"], result["documents"]) == (3, 0, 0, 3)


@pytest.mark.parametrize("where", ["library", "below/deep/library"])
def test_a_memory_among_the_texts_is_not_read(
    where: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But a manifest of something else is."""
    model, memory = make_run(tmp_path / "run"), texts / where
    (texts / "below" / "manifest.json").write_text('{"name": "an app"}')
    for read, known in ((4, 0), (0, 4), (0, 4)):
        result = told(capsys, "build", memory, texts, "--model", model)
        assert (result["read"], result["unchanged"], result["skipped"]) == (read, known, 2)


def test_what_was_broken_off_goes_on_and_ends_the_same(
    model: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("build", tmp_path / "whole", texts, "--model", model)
    portions: list[StopRequest] = []

    def stopping(self: Any, reader: DocumentReader, save: Any, seconds: float, wish: StopRequest) -> None:
        real(self, reader, save, seconds, wish)
        portions.append(wish)
        many = reader.read

        def some(*arguments: Any) -> Any:
            for count, part in enumerate(many(*arguments)):
                wish.signal = 2 if count == 1 else None
                yield part

        reader.read = some  # type: ignore[method-assign]

    real = cli_memory.Builder.__init__
    monkeypatch.setattr(cli_memory.Builder, "__init__", stopping)
    broken = tmp_path / "broken"
    while len(portions) < 9:
        try:
            cli_memory.main(options_of.parse(["build", str(broken), str(texts), "--model", model], "memory"))
        except Interrupted:
            if len(portions) == 4:  # a model of a run begins a text anew, and would never end
                monkeypatch.setattr(cli_memory.Builder, "__init__", real)
            continue
        break
    assert len(portions) >= 2
    assert names(broken) == names(tmp_path / "whole")
    one, other = (KNNMemoryList.load(path) for path in (tmp_path / "whole", broken))
    if "kind" in one.extra and one.extra["kind"] == "of a run":  # numbers differ, as it began anew
        assert [m.num_entries for m in one] == [m.num_entries for m in other]
    else:
        assert same(one, other)


def test_documents_can_be_listed_forgotten_verified_and_compacted(
    model: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = tmp_path / "memory"
    run("build", memory, texts, "--model", model, "--pattern", "*.txt")
    info = told(capsys, "info", memory)
    assert info["documents"] == 3
    assert info["bytes"] > 0
    listed = told(capsys, "documents", memory)
    assert [Path(each["title"]).name for each in listed] == ["one.txt", "zlong.txt", "two.txt"]
    assert all(each["tokens"] >= max(each["entries"]) > 0 for each in listed)
    gone = told(capsys, "forget", memory, "--document", listed[0]["title"])
    assert gone == {"documents": 1, "entries": sum(listed[0]["entries"])}
    assert told(capsys, "forget", memory, "--where", "*/below/*")["documents"] == 1
    assert [Path(each["title"]).name for each in told(capsys, "documents", memory)] == ["zlong.txt"]
    assert told(capsys, "verify", memory)["damaged"] == 0
    assert told(capsys, "compact", memory)["bytes"] <= info["bytes"]
    data = b"".join(path.read_bytes() for path in memory.iterdir())
    assert listed[0]["title"].encode() not in data
    run("documents", memory)
    run("info", memory)
    printed = capsys.readouterr().out
    assert "zlong.txt" in printed
    assert "documents      1" in printed


def test_it_is_said_when_documents_were_evicted(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("build", tmp_path / "memory", texts, "--model", make_run(tmp_path / "run"), "--max-memories", 3_000)
    said = capsys.readouterr().err
    assert "the memory is full: 1 document was evicted (--max-memories, for a new memory)" in said


def test_damage_is_found(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = tmp_path / "memory"
    run("build", memory, texts / "one.txt", "--model", make_run(tmp_path / "run"))
    path = next(memory.glob("base-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "expected SHA-256" in refused(capsys, "verify", memory)


def test_memories_of_a_model_of_transformers_are_merged_with_it(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_hub_model(tmp_path / "model")
    for name in ("one.txt", "zlong.txt"):
        run("build", tmp_path / name, texts / name, "--model", model, "--retrieve", "tokens")
    merge = ("merge", tmp_path / "both", tmp_path / "one.txt", tmp_path / "zlong.txt")
    assert "add --model" in refused(capsys, *merge)
    assert told(capsys, *merge, "--model", model)["documents"] == 2
    assert names(tmp_path / "both") == ["one.txt", "zlong.txt"]


def test_memories_of_one_model_can_be_merged(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_run(tmp_path / "run")
    for name in ("one.txt", "zlong.txt"):
        run("build", tmp_path / name, texts / name, "--model", model)
    merged = told(capsys, "merge", tmp_path / "both", tmp_path / "one.txt", tmp_path / "zlong.txt")
    assert merged["documents"] == 2
    assert names(tmp_path / "both") == ["one.txt", "zlong.txt"]
    other = make_run(tmp_path / "other", seed=1)
    run("build", tmp_path / "foreign", texts / "one.txt", "--model", other)
    line = refused(capsys, "merge", tmp_path / "all", tmp_path / "both", tmp_path / "foreign")
    assert "expected a memory written by weights with the fingerprint" in line
    assert not (tmp_path / "all").exists()


def test_a_run_writes_with_what_is_on_disk_and_leaves_it_alone(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, memory = make_run(tmp_path / "run"), tmp_path / "memory"
    run("build", memory, texts, "--model", model)
    before = {path.name: path.read_bytes() for path in memory.iterdir()}
    written = []
    for options in ([], ["--memories", str(memory)], ["--memories", str(memory)]):
        capsys.readouterr()
        main(["generate", str(model), "--prompt", "line 7 of a", "--max-new-tokens", "30", *options])
        written.append(capsys.readouterr().out)
    assert written[0] != written[1] == written[2]
    assert {path.name: path.read_bytes() for path in memory.iterdir()} == before


def test_a_memory_that_is_there_is_searched_as_it_is_said(
    model: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old, index = tmp_path / "new", tmp_path / "old", "IVF4,Flat"
    run("build", new, texts, "--model", model, "--index", index, "--retrieve", "tokens")
    run("build", old, texts, "--model", model, "--retrieve", "tokens")
    before = told(capsys, "info", old)["index"]
    run("build", old, texts / "one.txt", "--model", model)
    assert told(capsys, "info", old)["index"] == before
    reader = open_reader(model, "cpu", max_memories=None, dtype=None, index=index)
    reader.load(old, mmap=True)
    assert last_memory(reader).index == index
    assert isinstance(last_memory(reader).searcher, ApproximateIndex)
    run("build", old, texts, "--model", model, "--index", index)
    assert told(capsys, "info", old)["index"] == told(capsys, "info", new)["index"] != before
    if isinstance(reader, RunReader):
        assert "no-such" in refused(capsys, "build", old, texts, "--model", model, "--index", "no-such")
        options = Generate(run=Path(model), memories=old, index="exact")
        with memories_of(reader.run, options) as memories:
            assert memories is not None
            assert [each.index for each in memories] == ["exact"]


def last_memory(reader: DocumentReader) -> KNNMemory:
    """Of the last layer; that of old entries, where there is another."""
    if isinstance(reader, RunReader):
        return reader.memory[-1]
    return list(reader.memory.layers.values())[-1].memories[-1]


def test_bad_input_is_one_line(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, memory = make_run(tmp_path / "run"), tmp_path / "memory"
    build = ("build", memory, texts, "--model", model)
    run(*build)
    other, second = make_run(tmp_path / "other", seed=1), tmp_path / "second"
    run("build", second, texts / "one.txt", "--model", model)
    copy, link = shutil.copytree(memory, tmp_path / "copy"), tmp_path / "link"
    link.symlink_to(memory, target_is_directory=True)
    for lock in tmp_path.rglob(".lock"):
        lock.unlink()
    before = picture(tmp_path)
    for arguments, message in {
        ("build", memory, texts, "--model", other): "this memory was written by other weights",
        (*build, "--max-memories", 7): "--max-memories and --dtype are for a new memory only",
        ("build", memory, tmp_path / "no", "--model", model): "there is no file or folder",
        (
            "build",
            memory,
            texts,
            "--model",
            model,
            "--pattern",
            "*.java",
        ): "no files match '*.java'",
        ("build", texts, texts, "--model", model): "expected a new folder, an empty one or that of a memory",
        ("merge", texts, memory, copy): "hold the same saved state: name it once",
        ("merge", tmp_path / "new", memory, memory): "hold the same saved state: name it once",
        ("merge", tmp_path / "new", memory, link, f"{memory}/."): "hold the same saved state: name it once",
        ("merge", texts, memory, second): "expected a new folder, an empty one or that of a memory",
        ("merge", second, memory, second): "is both a memory to merge and the folder to write",
        ("merge", copy, memory, second): "holds a memory: write to a new folder",
        ("info", tmp_path / "nothing"): "which has no manifest.json",
        ("verify", texts): "which has no manifest.json",
        ("forget", memory): "choose documents either by --document or by --where",
        ("forget", memory, "--document", "Faust"): "'Faust' is neither the title nor the number of a document",
        ("forget", memory, "--document", texts / "one.txt", 77): "the memory has no document 77",
        ("forget", memory, "--document", 10**30): f"the memory has no document {10**30}",
        ("merge", tmp_path / "new", memory): "merge needs two or more memories, got 1",
        ("dream",): "expected a command among build, info, documents, forget, verify, compact, merge, got 'dream'",
    }.items():
        assert message in refused(capsys, *arguments)
        assert picture(tmp_path) == before
    assert len(names(memory)) == 3
    os.truncate(memory / NAME, 10)
    assert "expected the manifest of a memory" in refused(capsys, "documents", memory)


def test_a_file_that_two_merged_memories_held_is_read_once_when_it_changes(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, both = make_run(tmp_path / "run"), tmp_path / "both"
    for name in ("a", "b"):
        run("build", tmp_path / name, texts / "one.txt", "--model", model)
    run("merge", both, tmp_path / "a", tmp_path / "b")
    (texts / "one.txt").write_text("something else")
    assert told(capsys, "build", both, texts / "one.txt", "--model", model)["changed"] == 1
    assert told(capsys, "build", both, texts / "one.txt", "--model", model)["unchanged"] == 1
    assert names(both) == ["one.txt"]


def test_documents_whose_entries_were_evicted_can_be_forgotten_too(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = tmp_path / "memory"
    files = texts / "one.txt", texts / "zlong.txt"
    run("build", memory, *files, "--model", make_run(tmp_path / "run"), "--max-memories", 3_000)
    assert told(capsys, "forget", memory, "--document", texts / "one.txt") == {"documents": 1, "entries": 0}
    assert b"one.txt" not in (memory / NAME).read_bytes()


@pytest.mark.parametrize("content", ["kv", "tokens", "words"])
def test_every_command_serves_memories_of_passages(
    content: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of keys and values, of the finder's keys, and of token ids alone."""
    attach_spans = pytest.importorskip("memorizing_transformers_pytorch.huggingface.attach_spans")
    monkeypatch.setattr(attach_spans, "_finder_name", lambda *_, **__: "bm25" if content == "words" else "head")
    head = None if content == "words" else attach_spans.Head(0, 0, 1.0)
    monkeypatch.setattr(attach_spans, "best_head", lambda *_: head)
    if content == "words":
        pytest.importorskip("bm25s")
    model, memory = make_hub_model(tmp_path / "model"), tmp_path / "memory"
    kept = "tokens" if content == "words" else content
    spans = ("--model", model, "--retrieve", "spans", "--content", kept)
    assert told(capsys, "build", memory, texts, *spans, "--pattern", "*.txt")["documents"] == 3
    info = told(capsys, "info", memory)
    expected = {"kv": "spans", "tokens": "keys of the finder", "words": "token ids"}[content]
    assert info["documents"] == 3
    assert info["of"].startswith(f"attached to a Hugging Face model, {expected}")
    listed = told(capsys, "documents", memory)
    assert all(each["tokens"] == max(each["entries"]) > 0 for each in listed)
    assert told(capsys, "forget", memory, "--document", listed[0]["title"])["documents"] == 1
    assert told(capsys, "forget", memory, "--where", "*/below/*")["documents"] == 1
    assert told(capsys, "verify", memory)["damaged"] == 0
    assert told(capsys, "compact", memory)["bytes"] <= info["bytes"]
    run("build", tmp_path / "other", texts / "one.txt", *spans)
    merge = ("merge", tmp_path / "both", memory, tmp_path / "other")
    assert "add --model" in refused(capsys, *merge)
    assert told(capsys, *merge, "--model", model)["documents"] == 2
    assert names(tmp_path / "both") == ["zlong.txt", "one.txt"]
    run("build", tmp_path / "of-tokens", texts / "one.txt", "--model", model, "--retrieve", "tokens")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("merge", tmp_path / "mixed", memory, tmp_path / "of-tokens", "--model", model)
    assert "expected a memory of" in capsys.readouterr().err
    assert not (tmp_path / "mixed").exists()
