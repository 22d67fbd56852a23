"""From a configuration to tokens: nothing is done twice, nothing is held out and trained on, nothing goes stale."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memorizing_transformers_pytorch.data import cache
from memorizing_transformers_pytorch.data import prepare as module
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.prepare import Prepared, Splitter, make_splitter, prepare
from memorizing_transformers_pytorch.data.tokenizer import BPETokenizer, ByteTokenizer
from tests.data.texts import near_copy, prose


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.txt").write_text(prose(number, 60))
    return DataConfig(source=str(source), cache=tmp_path / "cache", valid=0.2, test=0.2)


def texts(prepared: Prepared) -> dict[str, str]:
    found = {}
    for split in (prepared.train, prepared.valid, prepared.test):
        for name, tokens in zip(split.names, split, strict=True):
            found[name] = prepared.tokenizer.decode(tokens.tolist())
    return found


@pytest.mark.parametrize(("tokenizer", "num_tokens"), [("bytes", 256), ("bpe", 300)])
def test_every_document_is_in_one_split(config: DataConfig, tokenizer: str, num_tokens: int) -> None:
    prepared = prepare(replace(config, tokenizer=tokenizer), num_tokens, progress=False)
    assert prepared.tokenizer.num_tokens == num_tokens
    assert texts(prepared) == {f"{number}.txt": prose(number, 60) for number in range(40)}
    assert len(prepared.train) + len(prepared.valid) + len(prepared.test) == 40
    assert min(len(prepared.train), len(prepared.valid), len(prepared.test)) > 0


def test_the_tokenizer_is_trained_on_the_training_split_alone(config: DataConfig) -> None:
    bytes_only = prepare(replace(config, tokenizer="bytes"), 256, progress=False)
    train = [bytes_only.tokenizer.decode(tokens.tolist()) for tokens in bytes_only.train]
    assert prepare(config, 300, progress=False).tokenizer.to_json() == BPETokenizer.train(train, 300).to_json()


def test_nothing_is_read_again_as_long_as_nothing_changes(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = prepare(config, 300, progress=False)
    monkeypatch.setattr(module, "make_splitter", None)
    monkeypatch.setattr(cache, "_write", None)
    after = prepare(config, 300, progress=False)
    assert after.fingerprint == before.fingerprint
    assert texts(after) == texts(before)
    same = prepare(replace(config, pack=True), 300, progress=False, tokenizer=before.tokenizer)
    assert same.fingerprint == before.fingerprint


def test_whatever_changes_the_tokens_or_their_split_makes_another_cache(config: DataConfig) -> None:
    source = Path(config.source)
    configs = [
        config,
        replace(config, test=0.3),
        replace(config, valid=0.3),
        replace(config, near_duplicates=None),
        replace(config, near_duplicates=0.9),
        replace(config, max_documents=39),
        replace(config, errors="strict"),
    ]
    for one in configs:
        prepare(one, 300, progress=False)
    prepare(config, 290, progress=False)
    prepare(replace(config, tokenizer="bytes"), 256, progress=False)
    (source / "0.txt").write_text("changed")
    assert texts(prepare(config, 300, progress=False))["0.txt"] == "changed"
    os.utime(source / "0.txt", ns=(1, 1))
    prepare(config, 300, progress=False)
    assert sum(path.is_dir() for path in config.cache.iterdir()) == len(configs) + 4


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(config: DataConfig, tmp_path: Path) -> None:
    before = prepare(config, 300, progress=False)
    moved = replace(config, source=str(tmp_path / "moved"))
    Path(config.source).rename(moved.source)
    os.utime(tmp_path / "moved" / "3.txt", ns=(1, 1))
    assert prepare(moved, 300, progress=False, tokenizer=before.tokenizer).fingerprint == before.fingerprint
    others = [replace(moved, test=0.4), replace(moved, valid=0.4), replace(moved, max_documents=39)]
    prints = {prepare(one, 300, progress=False, tokenizer=before.tokenizer).fingerprint for one in others}
    prints |= {prepare(moved, 290, progress=False).fingerprint, before.fingerprint}
    assert len(prints) == 5
    (tmp_path / "moved" / "0.txt").rename(tmp_path / "moved" / "00.txt")
    assert prepare(moved, 300, progress=False, tokenizer=before.tokenizer).fingerprint not in prints


def test_near_duplicates_are_looked_for_before_the_cache_is_begun(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looking(*arguments: Any, **options: Any) -> Splitter:
        assert not config.cache.exists()
        return make_splitter(*arguments, **options)

    monkeypatch.setattr(module, "make_splitter", looking)
    prepare(replace(config, tokenizer="bytes"), 256, progress=False)


def test_near_copies_lie_on_one_side(config: DataConfig) -> None:
    for number in range(12):
        (Path(config.source) / f"copy{number}.txt").write_text(near_copy(prose(0, 600), number))
    prepared = prepare(replace(config, tokenizer="bytes"), 256, progress=False)
    sides = [sum(name.startswith("copy") for name in split.names) for split in prepared[1:4]]  # type: ignore[attr-defined]
    assert sorted(sides) == [0, 0, 12]


def test_a_saved_tokenizer_is_taken_by_path_or_as_it_is(config: DataConfig, tmp_path: Path) -> None:
    trained = prepare(config, 300, progress=False)
    trained.tokenizer.save(tmp_path / "tokenizer.json")
    by_path = prepare(replace(config, tokenizer=str(tmp_path / "tokenizer.json")), 300, progress=False)
    assert by_path.fingerprint == trained.fingerprint
    given = prepare(config, 256, progress=False, tokenizer=ByteTokenizer())
    assert given.train.num_tokens_total == given.train.total_bytes


def test_progress_is_shown_if_asked_for(config: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(config, 300, progress=False)
    assert capsys.readouterr().err == ""
    prepare(config, 301)
    shown = capsys.readouterr().err
    assert all(step in shown for step in ("near-duplicates", "training the tokenizer", "tokenising"))


def test_what_cannot_be_is_refused_before_anything_is_written(config: DataConfig) -> None:
    with pytest.raises(ValueError, match="expected a tokenizer of 300 tokens, got one of 256"):
        prepare(replace(config, tokenizer="bytes"), 300, progress=False)
    with pytest.raises(ValueError, match="expected a tokenizer of 300 tokens, got one of 256"):
        prepare(config, 300, progress=False, tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match="does not exist"):
        prepare(replace(config, tokenizer="nowhere.json"), 300, progress=False)
    with pytest.raises(ValueError, match=r"expected text for 500,000 tokens, got enough for [\d,]+"):
        prepare(config, 500_000, progress=False)
    (Path(config.source) / "7.txt").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"binary file '.*7.txt'"):
        prepare(config, 300, progress=False)
    assert not config.cache.exists()
    for path in Path(config.source).iterdir():
        path.write_text("")
    with pytest.raises(ValueError, match=r"expected documents to train on in .*, got none in the training split"):
        prepare(replace(config, tokenizer="bytes"), 256, progress=False)
