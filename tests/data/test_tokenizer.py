"""The tokenizer: every text survives it, and so does the tokenizer itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing_transformers_pytorch.data.tokenizer import BPETokenizer

TEXT = "def remember(what):\n    return what\n" * 20
TOKENIZER = BPETokenizer.train([TEXT], 270)


@given(st.text(st.characters(codec="utf-8")))
def test_every_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_frequent_text_becomes_fewer_tokens() -> None:
    assert TOKENIZER.num_tokens == 270
    assert len(TOKENIZER.encode(TEXT)) < len(TEXT) / 2
    assert max(TOKENIZER.encode(TEXT)) < 270


def test_it_can_be_kept(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    assert BPETokenizer.load(tmp_path / "tokenizer.json").encode(TEXT) == TOKENIZER.encode(TEXT)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected num_tokens to be at least 256, got 255"):
        BPETokenizer.train([TEXT], 255)
    with pytest.raises(ValueError, match="does not exist"):
        BPETokenizer.load(tmp_path / "tokenizer.json")
