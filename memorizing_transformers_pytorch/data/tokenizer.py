"""Text to token ids and back: bytes, a byte-level BPE trained on the corpus at hand, or any tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from memorizing_transformers_pytorch.data.document import text_bytes
from memorizing_transformers_pytorch.utils.plain_json import parse_json

_BYTES_JSON = json.dumps({"type": "bytes"})


class Tokenizer(Protocol):
    """Writes text as numbers below `num_tokens`. Two with the same JSON do the same."""

    @property
    def num_tokens(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same as `encode_batch`, in arrays, which take much less memory."""

    def decode(self, tokens: Iterable[int]) -> str: ...

    def to_json(self) -> str: ...

    def save(self, path: str | Path) -> None:
        """Write the JSON, from which `load_tokenizer` makes it again."""


class ByteTokenizer:
    """The bytes themselves: exactly those of the file, where a text was read with surrogates for what is no UTF-8."""

    @property
    def num_tokens(self) -> int:
        return 256

    def encode(self, text: str) -> list[int]:
        return list(text_bytes(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text_bytes(text), dtype=np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def to_json(self) -> str:
        return _BYTES_JSON

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")


class BPETokenizer:
    """Byte-pair encoding over bytes (Sennrich et al. 2016): every text can be written, nothing is unknown.

    It also wraps whatever else the library `tokenizers` reads. Special tokens are neither added nor hidden, and nothing
    is cut or padded.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._num_tokens = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def train(cls, texts: Iterable[str], num_tokens: int) -> BPETokenizer:
        """Learn `num_tokens` tokens, at least the 256 bytes; the same from the same texts, whatever their order.

        Raises ValueError for fewer, or if the texts are not enough for so many.
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

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(_unicode(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [tokens.tolist() for tokens in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast([_unicode(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def to_json(self) -> str:
        return str(self._tokenizer.to_str())

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read what `save` wrote, or any tokenizer.json. Raises ValueError if there is none."""
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
