"""Memories of passages on disk: killed while they are built, forgotten, and merged with or loaded by others."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("bm25s")

from memorizing_transformers_pytorch.cli import memory as command
from memorizing_transformers_pytorch.cli.options.memory import Build
from memorizing_transformers_pytorch.data.tokenizer import ByteTokenizer
from memorizing_transformers_pytorch.huggingface.attach import memory_of
from memorizing_transformers_pytorch.huggingface.contents import Contents
from memorizing_transformers_pytorch.huggingface.export import for_transformers
from memorizing_transformers_pytorch.huggingface.finder import Head
from memorizing_transformers_pytorch.library.readers import COMPLETE, HubReader
from memorizing_transformers_pytorch.memory import KNNMemoryList
from tests.huggingface import spans
from tests.huggingface.families import tiny
from tests.huggingface.spans import attached, logits, read, tokens

KINDS: dict[str, dict[str, Any]] = {
    "kv": {"content": "kv", "dtype": torch.bfloat16},
    "kv in int8": {"content": "kv", "dtype": torch.int8},
    "tokens": {"content": "tokens", "finder": "head"},
    "tokens alone": {"content": "tokens", "finder": "bm25"},
}
by_kind = pytest.mark.parametrize("kind", KINDS)
TEXTS = {name: "".join(f"{name}, line {i}. " for i in range(size)) for name, size in (("a", 3), ("b", 12))}


# Killed


@by_kind
def test_killed_while_files_are_read_a_folder_holds_a_prefix_of_each_and_goes_on(kind: str, tmp_path: Path) -> None:
    """`memory build`, killed at some steps of storing and saving. (KILLS=50 for more.)"""
    texts, model = tmp_path / "texts", tiny("llama", "sdpa", vocab_size=256)
    texts.mkdir()
    for name, text in TEXTS.items():
        (texts / name).write_text(text)
    steps = build(model, kind, tmp_path / "whole", texts)
    expected, moments, found = KNNMemoryList.load(tmp_path / "whole"), random.Random(0), 0
    for attempt in range(int(os.environ.get("KILLS", "2"))):
        folder, fatal = tmp_path / f"killed {attempt}", moments.randrange(1, steps + 1)
        arguments = (model, kind, folder, texts, fatal)
        process = multiprocessing.get_context("fork").Process(target=build, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if (folder / "manifest.json").exists():
            found += holds_prefixes(KNNMemoryList.load(folder))
        build(model, kind, folder, texts)
        again = KNNMemoryList.load(folder)
        for one, other in zip(again, expected, strict=True):
            assert list(one.entries(0)) == list(other.entries(0))
            pairs = [each.store.oldest(0, each.num_entries[0]) for each in (one, other)]
            for name in ("keys", "values"):
                own, wanted = (getattr(pair, name).floats(torch.float32) for pair in pairs)
                torch.testing.assert_close(own, wanted, atol=0.05, rtol=0.05)
    assert found


def build(model: Any, kind: str, folder: Path, texts: Path, fatal: int | None = None) -> int:
    """Build a memory, saving after every piece -> in how many steps. fatal: the step before which it is killed."""
    steps = 0

    def counted(function: Any) -> Any:
        def step(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return step

    reader = object.__new__(HubReader)
    reader.model, reader.tokenizer, reader._index = model, for_transformers(ByteTokenizer()), None
    reader.memory = attached(model, chunk=16, overlap=4, tokenizer=reader.tokenizer, **KINDS[kind])
    with (
        mock.patch.object(os, "fsync", counted(os.fsync)),
        mock.patch.object(Contents, "store", counted(Contents.store)),
        mock.patch.object(command, "open_reader", return_value=reader),
    ):
        command.build(Build(memory=folder, files=(str(texts),), model="a model", save_every=0))
    memory_of(model).detach()
    return steps


def holds_prefixes(loaded: KNNMemoryList) -> bool:
    """Checks that each document is the beginning of its text, alike in all layers -> whether there is any."""
    entries = [list(part.entries(0)) for part in loaded]
    assert all(each == entries[0] for each in entries)
    for document in loaded.documents():
        text = TEXTS[Path(document.title).name].encode()
        own = [entry for entry in entries[0] if entry.document == document.number]
        assert bytes(entry.token for entry in own) == text[: document.tokens]
        assert (COMPLETE in loaded.ledger[document.number].about) <= (document.tokens == len(text))
    return bool(loaded.documents())


# Forgotten


@by_kind
def test_after_compaction_nothing_is_left_of_what_was_forgotten(kind: str, tmp_path: Path) -> None:
    """Neither token ids nor keys (of some tokens in a row: alone they recur) nor the title; nor is it found again."""
    model, folder = tiny("llama", "sdpa"), tmp_path / "memory"
    memory = attached(model, **KINDS[kind])
    memory.read(tokens(1, 90, seed=1), document="open", progress=False)
    memory.save(folder)
    memory.read(tokens(1, 40, seed=2), document="a secret", progress=False)
    memory.save(folder)
    secrets = traces(memory, slice(90, 130))
    held = bytes_in(folder)
    assert all(secret in held for secret in secrets)
    memory.forget("a secret")
    memory.save(folder, compact=True)
    held = bytes_in(folder)
    assert not any(secret[i : i + 64] in held for secret in secrets for i in range(0, len(secret), 64))
    assert b"a secret" not in held
    assert all(each in held for each in traces(memory, slice(0, 90)))
    expected = logits(model, tokens(1, 9, seed=2))
    memory.load(folder)
    assert [each.title for each in memory.documents()] == ["open"]
    assert {each.title for each in memory.recall(tokens(1, 40, seed=2)[0], passages=9)} == {"open"}
    assert torch.equal(logits(model, tokens(1, 9, seed=2)), expected)


def traces(memory: Any, places: slice) -> list[bytes]:
    """What files hold of these places, of each layer: origins (with token ids), keys."""
    stores = [layer.memories[0].store for layer in memory.layers.values()]
    tables: list[Tensor] = [store.origins[0, places] for store in stores]
    if memory.options.finder == "head":
        tables += [store.keys.numbers[0, 0, places] for store in stores]
    return [table.contiguous().view(torch.uint8).numpy().tobytes() for table in tables]


def bytes_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


# Of others


@by_kind
def test_a_memory_of_another_content_or_finder_is_refused_and_named(kind: str, tmp_path: Path) -> None:
    model = tiny("llama", "sdpa")
    memory = read(attached(model, **KINDS[kind]), tokens(1, 60))
    memory.save(tmp_path / "memory")
    memory.detach()
    names = {"kv": "spans in layers [0, 1]", "head": "keys of the finder, head 3 in layers [1]"}
    names |= {"bm25": "token ids in layers [0]"}
    own = names["kv" if kind.startswith("kv") else KINDS[kind]["finder"]]
    for options in ({"content": "kv"}, {"content": "tokens"}, {"content": "tokens", "finder": "bm25"}):
        other = names[options.get("finder", "kv" if options["content"] == "kv" else "head")]
        if own != other:
            expect_refusal(
                attached(model, **options), tmp_path / "memory", f"expected a memory of {other}, got one of {own}"
            )


def expect_refusal(memory: Any, folder: Path, message: str) -> None:
    """A memory loads and merges no such folder, and stays as it is."""
    read(memory, tokens(1, 50, seed=1))
    before, expected = memory.documents(), logits(memory.model, tokens(1, 9))
    for refused in (memory.load, memory.merge):
        with pytest.raises(ValueError, match=re.escape(message)):
            refused(folder)
    assert memory.documents() == before
    assert torch.equal(logits(memory.model, tokens(1, 9)), expected)
    memory.detach()


def test_keys_of_another_head_are_refused_and_both_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But keys and values of all layers serve any head."""
    model = tiny("llama", "sdpa")
    for content in ("tokens", "kv"):
        memory = read(attached(model, content=content), tokens(1, 60))
        memory.save(tmp_path / content)
        memory.detach()
    monkeypatch.setattr(spans, "last_head", lambda *_: Head(1, 2, 1.0))
    message = "expected a memory of keys of the finder, head 2 in layers [1], got one of keys of the finder, head 3"
    expect_refusal(attached(model, content="tokens"), tmp_path / "tokens", message)
    memory = attached(model, content="kv")
    memory.load(tmp_path / "kv")
    assert memory.recall(tokens(1, 9)[0])


@by_kind
def test_a_memory_of_another_model_is_refused_and_both_are_named(kind: str, tmp_path: Path) -> None:
    memory = read(attached(tiny("llama"), **KINDS[kind]), tokens(1, 60))
    memory.save(tmp_path / "memory")
    other = tiny("llama")
    other.config.name_or_path = "somebody/Another-1B"
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    message = "this memory was written by other weights (LlamaForCausalLM, fingerprint v2-"
    expect_refusal(attached(other, **KINDS[kind]), tmp_path / "memory", message)
    with pytest.raises(ValueError, match=r"the model in use has \(Another-1B, v2-"):
        attached(other, **KINDS[kind]).load(tmp_path / "memory")
