"""JSON of others: read, or refused with a ValueError that says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from memorizing_transformers_pytorch.utils.plain_json import parse_json, parse_object, read_object


def test_values_are_read(tmp_path: Path) -> None:
    assert parse_json("[1, null]", "here") == [1, None]
    assert parse_object(b'{"a": "\xc3\xa9"}', "here") == {"a": "\N{LATIN SMALL LETTER E WITH ACUTE}"}
    (tmp_path / "some.json").write_text('{"a": {}}')
    assert read_object(tmp_path / "some.json") == {"a": {}}


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "[" * 100_000, "1" * 5_000, b"\xff", b"\xed\xa0\x80", b"{\0}\0"])
def test_what_is_no_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="expected JSON in here, got an error: "):
        parse_json(text, "here")


def test_what_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected an object in here, got list"):
        parse_object("[]", "here")
    with pytest.raises(OSError, match="missing"):
        read_object(tmp_path / "missing")
