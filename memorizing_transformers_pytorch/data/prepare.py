"""From a configuration to tokenised documents: the corpus, its split, its tokenizer, and the cache that keeps them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from memorizing_transformers_pytorch.data import cache
from memorizing_transformers_pytorch.data.cache import TokenisedDocuments
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.corpora import open_corpus
from memorizing_transformers_pytorch.data.document import SPLITS, Corpus, Split, TextDocument
from memorizing_transformers_pytorch.data.split import Splitter, make_splitter
from memorizing_transformers_pytorch.data.tokenizer import BPETokenizer, Tokenizer, load_tokenizer
from memorizing_transformers_pytorch.utils.durable import replacing
from memorizing_transformers_pytorch.utils.progress import bar

# What decides on the text and the side of a document. The corpus and the tokenizer have fingerprints of their own.
_DECIDING = (
    "source", "pattern", "group", "errors", "text_column", "name_column", "nulls", "valid", "test", "near_duplicates",
)  # fmt: skip


class Prepared(NamedTuple):
    """A corpus ready to train on. fingerprint: of its tokens and names and their split, wherever they came from."""

    tokenizer: Tokenizer
    train: TokenisedDocuments
    valid: TokenisedDocuments
    test: TokenisedDocuments
    fingerprint: str


def prepare(config: DataConfig, num_tokens: int, progress: bool = True, tokenizer: Tokenizer | None = None) -> Prepared:
    """Tokenise the corpus, or find it in the cache. The text is read again only if something has changed.

    num_tokens: the vocabulary of the model: a BPE is trained to it; another tokenizer must have it.
    tokenizer: used instead of the configured one, such as that of a resumed run.
    Raises ValueError for a corpus that cannot be read, or leaves nothing to train on, and for another vocabulary.
    """
    if tokenizer is None and config.tokenizer != "bpe":
        tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is not None and tokenizer.num_tokens != num_tokens:
        raise ValueError(f"expected a tokenizer of {num_tokens:,} tokens, got one of {tokenizer.num_tokens:,}")
    corpus = open_corpus(config, progress)
    about = {name: getattr(config, name) for name in _DECIDING}
    about |= {"format": cache.FORMAT, "corpus": _hash(corpus.fingerprint())}

    @functools.cache
    def splitter() -> Splitter:
        documents = _shown(corpus, "looking for near-duplicates", progress and config.near_duplicates is not None)
        return make_splitter(documents, valid=config.valid, test=config.test, near_duplicates=config.near_duplicates)

    if tokenizer is None:
        tokenizer = _trained(config.cache, about, num_tokens, corpus, splitter, progress)
    about["tokenizer"] = _hash(tokenizer.to_json())
    key = _hash(json.dumps(about))
    if not (config.cache / key).is_dir():
        splitter()  # slow work, and errors, come before anything is written
    folder = cache.build(config.cache, key, _sided(corpus, splitter, "tokenising", progress), tokenizer, about)
    train, valid, test = (TokenisedDocuments(folder, split) for split in SPLITS)
    if not train.num_tokens_total:
        raise ValueError(f"expected documents to train on in {config.source!r}, got none in the training split")
    return Prepared(tokenizer, train, valid, test, _hash(train.content + valid.content + test.content))


def _trained(
    folder: Path,
    about: dict[str, Any],
    num_tokens: int,
    corpus: Corpus,
    splitter: Callable[[], Splitter],
    progress: bool,
) -> Tokenizer:
    """The BPE of a training split, kept so that it is trained once."""
    path = folder / f"bpe-{_hash(json.dumps([about, num_tokens]))}.json"
    if path.is_file():
        return load_tokenizer(path)
    sided = _sided(corpus, splitter, "training the tokenizer", progress)
    tokenizer = BPETokenizer.train((document.text for split, document in sided if split == "train"), num_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        tokenizer.save(aside)
    return tokenizer


def _sided(
    corpus: Corpus, splitter: Callable[[], Splitter], doing: str, progress: bool
) -> Iterator[tuple[Split, TextDocument]]:
    side = splitter()
    for document in _shown(corpus, doing, progress):
        yield side(document), document


def _shown(corpus: Iterable[TextDocument], doing: str, progress: bool) -> Iterable[TextDocument]:
    return bar(corpus, desc=doing, unit=" documents", disable=not progress)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]
