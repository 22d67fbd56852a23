"""The configuration: it refuses what makes no sense, and survives being written down."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import tyro

from memorizing_transformers_pytorch.data.config import DataConfig


def test_it_survives_being_written_as_json() -> None:
    config = DataConfig(source="enwik8", near_duplicates=None, max_documents=3, cache=Path("somewhere"))
    assert DataConfig(**json.loads(json.dumps(asdict(config), default=str))) == config


def test_it_can_be_given_on_the_command_line() -> None:
    arguments = ["--source", "books", "--near-duplicates", "None", "--cache", "x", "--group", "folder", "--pack"]
    expected = DataConfig(source="books", near_duplicates=None, cache=Path("x"), group="folder", pack=True)
    assert tyro.cli(DataConfig, args=arguments) == expected


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataConfig().cache == tmp_path / "memorizing_transformers_pytorch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert DataConfig().cache == Path.home() / ".cache" / "memorizing_transformers_pytorch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ""}, "expected source not to be empty"),
        ({"source": "hf:"}, "expected a name or path after 'hf:', got nothing"),
        ({"group": "author"}, "expected group to be one of file, folder, got 'author'"),
        ({"errors": "ignore"}, "expected errors to be one of replace, strict, got 'ignore'"),
        ({"valid": 0.5, "test": 0.5}, "expected valid and test from 0, below 1 together, got 0.5 and 0.5"),
        ({"test": -0.1}, "expected valid and test from 0"),
        ({"near_duplicates": 0.0}, "expected near_duplicates above 0, at most 1, got 0.0"),
        ({"max_documents": 0}, "expected max_documents of at least 1, got 0"),
        ({"streaming": True}, "expected streaming only with a source of hf:NAME, got source 'stdlib'"),
        ({"subset": "en"}, "expected subset only with a source of hf:NAME"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)  # type: ignore[arg-type]
