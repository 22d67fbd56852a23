"""What a user gives to be read or asked, as token ids.

Shapes: R rows, N tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memorizing_transformers_pytorch.data.texts import NoText, files_below, text_of
from memorizing_transformers_pytorch.huggingface.contents import Titles, checked_titles
from memorizing_transformers_pytorch.huggingface.models import check_ids, vocabulary_of
from memorizing_transformers_pytorch.memory.entries import as_int64

Readable = str | Path | Tensor | Mapping[str, Any]
"""Text, a file or folder of text, token ids, or the output of a tokenizer."""


class ToRead(NamedTuple):
    """Documents that are read side by side: input_ids (N,) or (R, N), and the rest as for `AttachedMemory.read`."""

    input_ids: Any
    attention_mask: Any
    titles: Titles


def to_read(given: Readable, attention_mask: Tensor | None, titles: Titles, tokenizer: Any) -> list[ToRead]:
    """What is to be read, one after the other. Each file of a folder is a document of its own.

    Raises ValueError for text without a tokenizer, a file that is not text, and a folder without any text.
    """
    if not isinstance(given, str | Path | Mapping):
        return [ToRead(given, attention_mask, titles)]
    if attention_mask is not None:
        raise ValueError(f"attention_mask goes with token ids; {type(given).__name__} must be given without one")
    if isinstance(given, str):
        return [ToRead(document_tokens(given, tokenizer), None, titles)]
    if isinstance(given, Path):
        texts = _texts_below(given) if given.is_dir() else {given.name: _text_in(given)}
        names = list(texts) if titles is None else checked_titles(titles, len(texts))
        tokens = [document_tokens(text, tokenizer) for text in texts.values()]
        return [ToRead(each, None, name) for each, name in zip(tokens, names, strict=True)]
    if "input_ids" not in given:
        raise ValueError(f"the output of a tokenizer has input_ids, got {sorted(given)}")
    return [ToRead(_as_tensor(given["input_ids"]), _as_tensor(given.get("attention_mask")), titles)]


def document_tokens(text: str, tokenizer: Any) -> Tensor:
    """(N,) with the special tokens with which a text begins. Raises ValueError without a tokenizer, and for a text
    without tokens."""
    ids = _with(tokenizer)(text, verbose=False).input_ids
    if not ids:
        raise NoText("there is nothing to read: the text has no tokens")
    return torch.tensor(ids, dtype=torch.int64)


def tokens_of(text: str | Tensor, tokenizer: Any, model: Any) -> Tensor:
    """Text, or token ids (N,) or (1, N) -> (N,). Raises ValueError for what has no tokens, and text without a
    tokenizer."""
    if isinstance(text, str):
        tokens = torch.tensor(_with(tokenizer)(text, add_special_tokens=False).input_ids, dtype=torch.int64)
    else:
        tokens = as_int64(text, "token ids").cpu().flatten()
    if len(tokens) == 0:
        raise ValueError("there is nothing to look for: the question has no tokens")
    check_ids(tokens, vocabulary_of(model), "the question")
    return tokens


def _with(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError("text needs a tokenizer: attach_memory(model, tokenizer=tokenizer), or give token ids")
    return tokenizer


def _as_tensor(ids: Any) -> Any:
    """What a tokenizer gives without return_tensors="pt" is a list."""
    try:
        return torch.tensor(ids) if isinstance(ids, list) else ids
    except ValueError as error:
        raise ValueError(f"texts of different lengths need padding: tokenizer(..., padding=True) ({error})") from None


def _text_in(path: Path) -> str:
    """Raises ValueError if there is no such file, or no text in it."""
    try:
        return text_of(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def _texts_below(folder: Path) -> dict[str, str]:
    """The texts of the files in a folder, by their paths in it. Warns of files that hold none."""
    texts, skipped = dict[str, str](), list[str]()
    for path in files_below([str(folder)], "*"):
        try:
            texts[path.relative_to(folder).as_posix()] = _text_in(path)
        except ValueError as error:
            skipped.append(str(error))
    if skipped:
        warnings.warn(f"skipped {'; '.join(skipped)}", stacklevel=5)
    if not texts:
        raise ValueError(f"there is no text in any file of {str(folder)!r}")
    return texts
