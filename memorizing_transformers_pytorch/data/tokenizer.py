"""Text to token ids and back: a byte-level BPE trained on the corpus at hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


class BPETokenizer:
    """Byte-pair encoding over bytes (Sennrich et al. 2016): every text can be written, nothing is unknown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], num_tokens: int) -> BPETokenizer:
        """Learn `num_tokens` tokens, at least the 256 bytes. Raises ValueError for fewer."""
        if num_tokens < 256:
            raise ValueError(f"expected num_tokens to be at least 256, got {num_tokens}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=num_tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        """Read what `save` wrote. Raises ValueError if there is no such file."""
        if not Path(path).is_file():
            raise ValueError(f"expected a tokenizer file, got {str(path)!r}, which does not exist")
        return cls(Tokenizer.from_file(str(path)))

    def save(self, path: str | Path) -> None:
        self._tokenizer.save(str(path))

    @property
    def num_tokens(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))
