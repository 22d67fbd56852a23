"""Text to token ids and back: bytes, a byte-level BPE trained on the corpus at hand, or any tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from memorizing_transformers_pytorch.data.document import text_bytes
from memorizing_transformers_pytorch.utils.plain_json import parse_json

_BYTES_JSON = json.dumps({"type": "bytes"})


class ByteTokenizer:
    """The bytes themselves, as they are in the file (bytes that are not UTF-8 are surrogates in the text)."""

    num_tokens = 256

    def encode(self, text: str) -> list[int]:
        return list(text_bytes(text))

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, in arrays, which take much less memory than lists."""
        return [np.frombuffer(text_bytes(text), dtype=np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def to_json(self) -> str:
        """What `save` writes. Two tokenizers with the same JSON do the same."""
        return _BYTES_JSON

    def save(self, path: str | Path) -> None:
        """Write the JSON, which `load_tokenizer` reads."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


class BPETokenizer:
    """Byte-pair encoding over bytes (Sennrich et al. 2016), which can write every text; or any other tokenizer that the
    library `tokenizers` reads. Special tokens are neither added nor hidden, and texts are not truncated or padded."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.num_tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def train(cls, texts: Iterable[str], num_tokens: int) -> BPETokenizer:
        """Learn `num_tokens` tokens, at least the 256 bytes; the same from the same texts, whatever their order.

        Raises ValueError for fewer than 256, or for more tokens than the texts can give.
        """
        if num_tokens < 256:
            raise ValueError(f"expected num_tokens to be at least 256, got {num_tokens}")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=num_tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(map(_unicode, texts), trainer)
        trained = cls(tokenizer)
        if trained.num_tokens != num_tokens:
            raise ValueError(f"expected text for {num_tokens:,} tokens, got enough for {trained.num_tokens:,}")
        return trained

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(_unicode(text), add_special_tokens=False).ids)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast([_unicode(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def to_json(self) -> str:
        return str(self._tokenizer.to_str())

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")


Tokenizer = ByteTokenizer | BPETokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """What `save` wrote, or any tokenizer.json; for "bytes" the `ByteTokenizer`. Raises ValueError for other files."""
    if path == "bytes":
        return ByteTokenizer()
    if not Path(path).is_file():
        raise ValueError(f"expected a tokenizer file, got {str(path)!r}, which does not exist")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"expected JSON of a tokenizer in {str(path)!r}, got an error: {error}") from error
    kind = parse_json(text, f"the tokenizer in {str(path)!r}")
    if kind == json.loads(_BYTES_JSON):
        return ByteTokenizer()
    try:
        return BPETokenizer(tokenizers.Tokenizer.from_str(text))
    except BaseException as error:
        # The library raises nothing more precise for a malformed file, or panics, which is no Exception.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"expected a tokenizer in {str(path)!r}, got an error: {error}") from error


def _unicode(text: str) -> str:
    """The library takes no lone surrogates: bytes that are no UTF-8 become U+FFFD."""
    return text if text.isascii() else text_bytes(text).decode("utf-8", "replace")
