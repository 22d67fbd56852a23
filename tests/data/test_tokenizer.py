"""Tokenizers: every text survives them, and so do the tokenizers themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from memorizing_transformers_pytorch.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

TEXT = "def remember(what):\n    return what\n" * 20
TOKENIZERS: list[Tokenizer] = [ByteTokenizer(), BPETokenizer.train([TEXT], 270)]
BPE = TOKENIZERS[1]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=3))
def test_every_text_comes_back(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoded = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(tokens) for tokens in encoded] == texts
    assert [tokens.tolist() for tokens in tokenizer.encode_arrays(texts)] == encoded
    assert all(0 <= token < tokenizer.num_tokens for tokens in encoded for token in tokens)


@given(st.binary())
def test_bytes_that_are_no_text_are_kept_by_the_byte_tokenizer_and_replaced_by_the_other(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    assert bytes(ByteTokenizer().encode(text)) == data
    assert BPE.decode(BPE.encode(text)) == data.decode("utf-8", "replace")


def test_frequent_text_becomes_fewer_tokens() -> None:
    assert BPE.num_tokens == 270
    assert len(BPE.encode(TEXT)) < len(TEXT) / 2


def test_training_depends_on_nothing_but_the_texts() -> None:
    texts = [f"{TEXT[number:]} {number * 7919} remembered" for number in range(50)]
    first = BPETokenizer.train(texts, 320).to_json()
    assert BPETokenizer.train(iter(texts), 320).to_json() == first
    assert BPETokenizer.train(texts[::-1], 320).to_json() == first


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_it_can_be_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert loaded.to_json() == tokenizer.to_json()


def test_a_foreign_tokenizer_neither_adds_nor_cuts(tmp_path: Path) -> None:
    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 5, "[CLS]": 9}, unk_token="[UNK]"))
    foreign.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    foreign.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 9)])
    foreign.add_special_tokens(["[CLS]"])
    foreign.enable_truncation(2)
    foreign.enable_padding(length=8)
    foreign.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.num_tokens == 10
    assert loaded.encode("a b a [CLS]") == [0, 5, 0, 9]
    assert [tokens.tolist() for tokens in loaded.encode_arrays(["a", "a b a"])] == [[0], [0, 5, 0]]
    assert loaded.decode([0, 9]) == "a [CLS]"


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected num_tokens to be at least 256, got 255"):
        BPETokenizer.train([TEXT], 255)
    with pytest.raises(ValueError, match=r"expected text for 5,000 tokens, got enough for \d\d\d"):
        BPETokenizer.train([TEXT], 5000)
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "tokenizer.json")
    for text in ("", "{", "[]", "\xff", json.dumps({"type": "bytes", "more": 1}), json.dumps({"model": None})):
        (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"expected .*tokenizer in .*tokenizer.json', got an error"):
            load_tokenizer(tmp_path / "tokenizer.json")


def test_a_file_at_which_the_library_panics_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    BPETokenizer.train([TEXT], 260).save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["continuing_subword_prefix"] = "longer than the second half of any merge"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a tokenizer in .*tokenizer.json', got an error"):
        load_tokenizer(path)
