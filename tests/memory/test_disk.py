"""What is saved is what is loaded; whatever happens in between, a folder holds the old state or the new."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from memorizing_transformers_pytorch import KNNMemory
from memorizing_transformers_pytorch.memory import KNNMemoryList
from memorizing_transformers_pytorch.memory.disk import manifest
from memorizing_transformers_pytorch.memory.disk import save as disk_save
from memorizing_transformers_pytorch.memory.disk.manifest import FORMAT, NAME, checksum_of
from memorizing_transformers_pytorch.memory.disk.save import SaveError, locked
from memorizing_transformers_pytorch.memory.disk.shards import OBSOLETE
from tests.golden import memory_v1
from tests.soak.machine import failing


def memories(rows: int = 2, capacity: int = 50, **options: Any) -> KNNMemoryList:
    return KNNMemoryList([KNNMemory(8, capacity, rows, num_kv_heads=2, **options) for _ in range(2)])


def add(to: KNNMemoryList, count: int, document: int = 0) -> None:
    rows = to[0].num_indices
    numbers = torch.arange(count).expand(rows, count)
    origins = torch.stack((torch.full_like(numbers, document), numbers, numbers % 5), dim=-1)
    to.add([torch.randn(rows, 2, count, 2, 8) for _ in to], origins=origins)


def read(to: KNNMemoryList, title: str, count: int) -> None:
    number = to.ledger.begin(title, 0, 0)
    add(to, count, number)
    to.ledger.grow(number, count)


def contents(of: KNNMemoryList) -> list[dict[str, Tensor]]:
    """Every table of every row of every memory, the oldest entry first."""
    return [each.store.picked(row, each.store.places_in_order(row)) for each in of for row in range(each.num_indices)]


def same(one: KNNMemoryList, other: KNNMemoryList) -> bool:
    pairs = zip(contents(one), contents(other), strict=True)
    return all(torch.equal(table, b[name]) for a, b in pairs for name, table in a.items())


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != ".lock"}


def changed_manifest(folder: Path, change: Callable[[dict[str, Any]], None], *, honest: bool = True) -> None:
    """Change what the manifest says, with the right checksum, as somebody would who means harm."""
    whole = json.loads((folder / NAME).read_text())
    change(whole)
    if honest:
        whole["sha256"] = checksum_of(whole["memory"])
    (folder / NAME).write_text(json.dumps(whole))


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("count", [0, 7, 50, 71])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, count: int, dtype: torch.dtype, mmap: bool) -> None:
    saved = memories(dtype=dtype, policy="by-document")
    read(saved, "one", count)
    saved.extra, saved.fingerprint = {"of": ["anything"]}, "abc"
    saved.save(tmp_path / "memory")
    loaded = KNNMemoryList.load(tmp_path / "memory", mmap=mmap)
    assert same(saved, loaded)
    assert repr(loaded) == repr(saved)
    assert (loaded.extra, loaded.fingerprint) == (saved.extra, saved.fingerprint)
    assert loaded.documents() == saved.documents()
    assert [each.policy for each in loaded] == ["by-document"] * 2
    queries = torch.randn(2, 2, 3, 8)
    for one, other in zip(saved, loaded, strict=True):
        for got, expected in zip(other.search(queries, 4), one.search(queries, 4), strict=True):
            assert torch.equal(got, expected)


def test_a_save_writes_only_what_was_added_since(tmp_path: Path) -> None:
    memory = memories(rows=1, capacity=5_000)
    add(memory, 4_000)
    memory.save(tmp_path / "memory")
    first = sizes(tmp_path / "memory")
    add(memory, 3)
    memory.save(tmp_path / "memory")
    second = sizes(tmp_path / "memory")
    new = {name: size for name, size in second.items() if name not in first}
    assert {name.split("-")[0] for name in new} == {"journal"}
    assert sum(new.values()) < 0.01 * sum(first.values())
    assert same(memory, KNNMemoryList.load(tmp_path / "memory"))


def test_many_small_saves_leave_few_files(tmp_path: Path) -> None:
    memory = memories(rows=1, capacity=5_000)
    add(memory, 4_000)
    for _ in range(150):
        add(memory, 1)
        memory.save(tmp_path / "memory")
    assert len(sizes(tmp_path / "memory")) < 70
    assert same(memory, KNNMemoryList.load(tmp_path / "memory", mmap=True))


@pytest.mark.parametrize("mmap", [False, True])
def test_saving_after_loading_goes_on_from_there(tmp_path: Path, mmap: bool) -> None:
    memory = memories()
    for _ in range(6):
        add(memory, 17)
        memory.save(tmp_path / "memory")
        memory = KNNMemoryList.load(tmp_path / "memory", mmap=mmap)
    kept = contents(memory)
    assert [len(each["origins"]) for each in kept] == [50] * 4
    assert same(memory, KNNMemoryList.load(tmp_path / "memory"))


def test_what_another_has_saved_meanwhile_is_not_lost(tmp_path: Path) -> None:
    one = memories()
    add(one, 5)
    one.save(tmp_path / "memory")
    other = KNNMemoryList.load(tmp_path / "memory")
    add(other, 2)
    other.save(tmp_path / "memory")
    add(one, 1)
    for refused in (one, memories()):
        with pytest.raises(ValueError, match=r"to hold what was saved or loaded here before, got something else"):
            refused.save(tmp_path / "memory")
    assert same(other, KNNMemoryList.load(tmp_path / "memory"))
    one.save(tmp_path / "memory", overwrite=True)
    assert same(one, KNNMemoryList.load(tmp_path / "memory"))


def test_readers_of_a_mapped_memory_may_add_to_it_and_change_no_file(tmp_path: Path) -> None:
    memory = memories()
    add(memory, 50)
    memory.save(tmp_path / "memory")
    before = {name: (tmp_path / "memory" / name).read_bytes() for name in sizes(tmp_path / "memory")}
    reader = KNNMemoryList.load(tmp_path / "memory", mmap=True)
    add(reader, 3)
    reader.forget(0)
    assert [each.num_entries for each in reader] == [(0, 0)] * 2
    assert {name: (tmp_path / "memory" / name).read_bytes() for name in before} == before
    assert same(memory, KNNMemoryList.load(tmp_path / "memory"))


def test_a_mapped_memory_outlives_the_state_it_was_opened_from(tmp_path: Path) -> None:
    memory = memories()
    add(memory, 50)
    memory.save(tmp_path / "memory")
    reader, expected = KNNMemoryList.load(tmp_path / "memory", mmap=True), contents(memory)
    add(memory, 50)
    memory.save(tmp_path / "memory", compact=True)
    for got, wanted in zip(contents(reader), expected, strict=True):
        assert all(torch.equal(table, wanted[name]) for name, table in got.items())


def test_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    memory = memories(dtype=torch.bfloat16)
    add(memory, 9)
    memory.save(tmp_path / "memory")
    for path, each in zip(_bases(tmp_path / "memory"), memory, strict=True):
        tables = safetensors.torch.load_file(path)
        assert tables["keys"].shape == (2, 2, 11, 8)
        assert torch.equal(tables["keys"][:, :, :9], each.store.tables["keys"][:, :, :9])


def _bases(folder: Path) -> list[Path]:
    return [folder / base["file"]["name"] for base in json.loads((folder / NAME).read_text())["memory"]["memories"]]


def test_after_compaction_nothing_is_left_of_what_was_forgotten(tmp_path: Path) -> None:
    memory = memories(rows=1, capacity=5_000)
    read(memory, "open", 2_000)
    read(memory, "a secret", 10)
    secret = memory[0].store.tables["keys"][0, 0, 2_000:2_010].numpy().tobytes()
    memory.save(tmp_path / "memory")
    files = [path.read_bytes() for path in (tmp_path / "memory").iterdir()]
    assert any(secret in data for data in files)
    assert memory.forget("a secret") == 20
    memory.save(tmp_path / "memory", compact=True)
    for path in (tmp_path / "memory").iterdir():
        data = path.read_bytes()
        assert not any(secret[i : i + 32] in data for i in range(0, len(secret), 32))
        assert b"a secret" not in data
    assert [each.title for each in KNNMemoryList.load(tmp_path / "memory").documents()] == ["open"]


# Damage


def _flip_a_bit(folder: Path) -> None:
    path = _bases(folder)[0]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def _set(*keys: Any, value: Any) -> Callable[[Path], None]:
    """Let the manifest say something else."""

    def damage(folder: Path) -> None:
        def change(whole: dict[str, Any]) -> None:
            place = whole
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = value

        changed_manifest(folder, change)

    return damage


def _link(folder: Path) -> None:
    path = _bases(folder)[0]
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


FIRST = ("memory", "memories", 0)
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (lambda f: os.truncate(_bases(f)[0], 1_000), "expected .* bytes in .*, got 1,000"),
    "a flipped bit": (_flip_a_bit, "expected SHA-256"),
    "a file that is gone": (lambda f: _bases(f)[1].unlink(), "expected all files of the memory"),
    "a link": (_link, "got a link or something else"),
    "no manifest": (lambda f: (f / NAME).unlink(), "expected the folder of a memory, got .* no manifest.json"),
    "half a manifest": (lambda f: os.truncate(f / NAME, 300), "expected the manifest of a memory in"),
    "another format": (lambda f: (f / NAME).write_text("{}"), f"expected the format '{FORMAT}', got another"),
    "a newer format": (_set("version", value=2), "expected version 1 of the format, got 2"),
    "a changed manifest": (
        lambda f: changed_manifest(f, lambda whole: whole["memory"].update(saved="x"), honest=False),
        "expected what its SHA-256 tells",
    ),
    "a path out of the folder": (
        _set(*FIRST, "file", "name", value="../base-" + "0" * 32 + ".safetensors"),
        "expected different files with names such as",
    ),
    "absurd sizes": (_set(*FIRST, "max_memories", value=2**60), "expected at most .* numbers in a memory"),
    "absurd room": (_set(*FIRST, "room", value=2**40), "expected room for 0 to 50 entries"),
    "more entries than there are": (_set(*FIRST, "rows", 0, "filled", value=21), "expected the next entry after"),
    "a foreign dtype": (_set(*FIRST, "dtype", value="object"), "expected a dtype of"),
    "an index that is none": (_set(*FIRST, "index", value="rm -rf"), "index"),
    "a document in no row": (
        _set("memory", "documents", value=[{"number": 0, "title": "", "row": 7, "tokens": 1, "start": 0}]),
        "expected different documents|expected documents in rows 0 to 1",
    ),
    "text for a number": (_set(*FIRST, "dim", value="8"), "dim"),
    "unknown fields": (_set("memory", "command", value="rm"), "command"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGES[kind]
    memory = memories()
    add(memory, 20)
    memory.save(tmp_path / "memory")
    damage(tmp_path / "memory")
    with pytest.raises(ValueError, match=message):
        KNNMemoryList.load(tmp_path / "memory")


def test_numbers_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    memory = memories()
    add(memory, 20)
    memory[0].store.tables["keys"][0, 0, 3, 2] = torch.nan
    memory.save(tmp_path / "memory")
    with pytest.raises(ValueError, match="expected finite keys"):
        KNNMemoryList.load(tmp_path / "memory")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    memory = memories()
    memory.fingerprint = "those"
    memory.save(tmp_path / "memory")
    KNNMemoryList.load(tmp_path / "memory", fingerprint="those")
    KNNMemoryList.load(tmp_path / "memory")
    with pytest.raises(ValueError, match="expected a memory written by weights with the fingerprint these, got those"):
        KNNMemoryList.load(tmp_path / "memory", fingerprint="these")


# Failures


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("step", ["disk.save.write_tensors", "disk.save.write_manifest"])
def test_a_full_disk_leaves_the_old_state_and_no_litter(tmp_path: Path, step: str, compact: bool) -> None:
    memory = memories()
    add(memory, 20)
    memory.save(tmp_path / "memory")
    before, old = sizes(tmp_path / "memory"), KNNMemoryList.load(tmp_path / "memory")
    add(memory, 1)
    with failing(step, after=0), pytest.raises(SaveError, match=r"could not save .*nothing has changed.*No space left"):
        memory.save(tmp_path / "memory", compact=compact)
    assert sizes(tmp_path / "memory") == before
    assert same(old, KNNMemoryList.load(tmp_path / "memory"))
    memory.save(tmp_path / "memory")
    assert same(memory, KNNMemoryList.load(tmp_path / "memory"))


def _save_within_a_quota(folder: Path) -> None:
    memory = KNNMemoryList.load(folder)
    add(memory, 30)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
    try:
        memory.save(folder, compact=True)
    except SaveError as error:
        os._exit(getattr(error.__cause__, "errno", 0))
    os._exit(0)


def test_a_quota_that_is_used_up_leaves_the_old_state(tmp_path: Path) -> None:
    memory = memories()
    add(memory, 20)
    memory.save(tmp_path / "memory")
    process = multiprocessing.get_context("fork").Process(target=_save_within_a_quota, args=(tmp_path / "memory",))
    process.start()
    process.join()
    assert process.exitcode == errno.EFBIG
    assert same(memory, KNNMemoryList.load(tmp_path / "memory"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "memory"):
        with pytest.raises(SaveError, match="could not save to"):
            memories().save(path)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "base-1.safetensors", "checkpoints/step-1"])
def test_a_folder_of_other_things_is_refused_and_stays_as_it_is(tmp_path: Path, name: str) -> None:
    folder, memory = tmp_path / "folder", memories()
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    with pytest.raises(ValueError, match=r"expected a new folder, .* with '"):
        memory.save(folder)
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / name]
    memory.save(folder, overwrite=True)
    add(memory, 1)
    memory.save(folder)  # it is that of the memory now
    assert same(memory, KNNMemoryList.load(folder))
    assert (folder / name).read_text() == "mine"


# Processes


def _save_for_ever(folder: Path, ready: Any) -> None:
    """Each save adds one entry, whose document is its number; now and then all is written anew."""
    memory = KNNMemoryList.load(folder)
    ready.set()
    for number in itertools.count(memory[0].num_entries[0]):
        add(memory, 1, document=number)
        memory.save(folder, compact=number % 5 == 0)


def test_killed_at_any_moment_a_folder_holds_one_state_or_the_next(tmp_path: Path) -> None:
    """(KILLS=200 for more.)"""
    folder, found, moments = tmp_path / "memory", 1, random.Random(0)
    memory = memories(capacity=100_000)
    add(memory, 1)
    memory.save(folder)
    for _ in range(int(os.environ.get("KILLS", "20"))):
        context = multiprocessing.get_context("fork")
        ready = context.Event()  # a busy machine takes its time for that
        process = context.Process(target=_save_for_ever, args=(folder, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(moments.uniform(0.01, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        loaded = KNNMemoryList.load(folder)
        for each in loaded:
            assert [origin.document for origin in each.entries(1)] == list(range(each.num_entries[1]))
        assert loaded[0].num_entries == loaded[1].num_entries
        assert loaded[0].num_entries[0] >= found
        found = loaded[0].num_entries[0]
    assert found > 1


def _killed_in_a_save(folder: Path, step: str) -> None:
    memory = memories()
    add(memory, 20)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"memorizing_transformers_pytorch.{step}", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        memory.save(folder)


@pytest.mark.parametrize(
    "step", ["memory.disk.shards._header", "memory.disk.save.write_manifest", "utils.durable.sync"]
)
def test_killed_in_its_first_save_a_folder_can_be_saved_to(tmp_path: Path, step: str) -> None:
    """With a file begun, with all of them, and with a manifest that has no name yet."""
    folder, memory = tmp_path / "memory", memories()
    process = multiprocessing.get_context("fork").Process(target=_killed_in_a_save, args=(folder, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = {path.name for path in folder.iterdir()}
    assert len(left) > 1
    memory.save(folder)
    assert same(memory, KNNMemoryList.load(folder))
    assert left.isdisjoint(path.name for path in folder.iterdir() if path.name != ".lock")


def _hold_the_lock(folder: Path, ready: Any) -> None:
    with locked(folder):
        ready.set()
        time.sleep(60)


def test_one_writer_at_a_time_and_a_dead_one_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memories()
    memory.save(tmp_path / "memory")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold_the_lock, args=(tmp_path / "memory", ready))
    process.start()
    assert ready.wait(60)
    monkeypatch.setattr(disk_save.locked.__wrapped__, "__defaults__", (0.1,))
    with pytest.raises(SaveError, match=r"locked by another process; wait, or remove \.lock if that process has died"):
        memory.save(tmp_path / "memory")
    KNNMemoryList.load(tmp_path / "memory")  # readers need no lock
    process.kill()
    process.join()
    memory.save(tmp_path / "memory")


def _digest_of(folder: Path, answers: Any) -> None:
    torch.set_num_threads(1)
    loaded = KNNMemoryList.load(folder, mmap=True)
    answers.put(hashlib.sha256(loaded[0].store.tables["keys"].numpy().tobytes()).hexdigest())


def test_processes_read_the_same_files_at_once(tmp_path: Path) -> None:
    memory = memories()
    add(memory, 50)
    memory.save(tmp_path / "memory")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_digest_of, args=(tmp_path / "memory", answers)) for _ in range(2)]
    for process in processes:
        process.start()
    own = hashlib.sha256(
        KNNMemoryList.load(tmp_path / "memory", mmap=True)[0].store.tables["keys"].numpy().tobytes()
    ).hexdigest()
    assert [answers.get(timeout=120) for _ in processes] == [own, own]
    for process in processes:
        process.join()


# Version 1


@pytest.mark.parametrize("mmap", [False, True])
def test_a_memory_that_version_1_has_written_can_be_loaded(mmap: bool) -> None:
    expected = memory_v1.expected()
    memory_v1.add_more(expected)
    with pytest.warns(UserWarning, match="policy 'least-attended' was removed; this memory uses 'oldest' from now on"):
        loaded = KNNMemoryList.load(memory_v1.FOLDER, mmap=mmap, verify=True)
    assert same(expected, loaded)
    assert repr(loaded) == repr(expected)
    assert [each.policy for each in loaded] == ["oldest", "oldest", "by-document"]
    assert (loaded.fingerprint, loaded.extra) == (expected.fingerprint, expected.extra)
    described = [(each.title, each.row, each.tokens, each.entries, each.about) for each in loaded.documents()]
    assert described == [(each.title, each.row, each.tokens, each.entries, each.about) for each in expected.documents()]


def test_version_1_is_written_as_it_was(tmp_path: Path) -> None:
    """Another tensor, field or layout in the files is another version of the format; a few are left out by now."""
    made = memory_v1.expected()
    made.save(tmp_path / "memory")
    memory_v1.add_more(made)
    made.save(tmp_path / "memory")
    one, other = (json.loads((folder / NAME).read_text()) for folder in (memory_v1.FOLDER, tmp_path / "memory"))
    for each in one["memory"]["memories"]:
        del each["clock"]
    assert _names(one) == _names(other)
    for kind in ("memories", "journals"):
        for before, now in zip(one["memory"][kind], other["memory"][kind], strict=True):
            old = safetensors.torch.load_file(memory_v1.FOLDER / before["file"]["name"])
            new = safetensors.torch.load_file(tmp_path / "memory" / now["file"]["name"])
            old = {name: table for name, table in old.items() if name.rpartition(".")[2] not in OBSOLETE}
            assert {name: table.tolist() for name, table in old.items()} == {n: t.tolist() for n, t in new.items()}


def test_a_memory_of_version_1_goes_on_in_today_s_form(tmp_path: Path) -> None:
    """A journal beside old bases, and new bases, can be loaded without a warning."""
    folder = shutil.copytree(memory_v1.FOLDER, tmp_path / "memory")
    with pytest.warns(UserWarning, match="was removed"):
        loaded = KNNMemoryList.load(folder, mmap=True)
    memory_v1.add(loaded, "third", 3)
    for compact in (False, True):
        loaded.save(folder, compact=compact)
        assert same(loaded, KNNMemoryList.load(folder))


@pytest.mark.parametrize("index", ["HNSW32", "PQ8", "SQ8", "IVF4,PQ2", "OPQ4,IVF8,PQ4", "Flat", "IVF8_HNSW8,SQ4"])
def test_a_memory_that_names_an_index_that_was_removed_is_searched_with_auto(tmp_path: Path, index: str) -> None:
    memory = memories()
    add(memory, 20)
    memory.save(tmp_path / "memory")
    for number in range(2):
        _set("memory", "memories", number, "index", value=index)(tmp_path / "memory")
    with pytest.warns(UserWarning, match=f"index '{index}' was removed; this memory uses 'auto' from now on"):
        loaded = KNNMemoryList.load(tmp_path / "memory")
    assert [each.index for each in loaded] == ["auto"] * 2
    assert same(loaded, memory)
    add(loaded, 1)
    loaded.save(tmp_path / "memory")
    assert [each.index for each in KNNMemoryList.load(tmp_path / "memory")] == ["auto"] * 2


def _names(value: Any) -> Any:
    """What the fields are called."""
    if isinstance(value, dict):
        return {name: _names(each) for name, each in value.items()}
    return [_names(each) for each in value] if isinstance(value, list) else None


@pytest.mark.parametrize("extra", [{"set": {1}}, {"nan": float("nan")}, {"long": "a" * 2**20}])
def test_what_could_not_be_read_again_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    monkeypatch.setattr(manifest, "MOST_BYTES", 2**20)
    memory = memories()
    add(memory, 3)
    memory.save(tmp_path / "memory")
    before = sizes(tmp_path / "memory")
    memory.extra = extra
    with pytest.raises(ValueError, match="expected documents and extra that can be read again"):
        memory.save(tmp_path / "memory")
    assert sizes(tmp_path / "memory") == before
    memory.extra = {"numbers as names": {9: 1, 10: 2}}
    memory.save(tmp_path / "memory")
    assert KNNMemoryList.load(tmp_path / "memory").extra == {"numbers as names": {"9": 1, "10": 2}}
