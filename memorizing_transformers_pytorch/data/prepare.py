"""From a configuration to tokenised documents: the corpus, its split, its tokenizer, and the cache that keeps them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from memorizing_transformers_pytorch.data import cache, enwik8, files
from memorizing_transformers_pytorch.data.cache import TokenisedDocuments
from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.data.document import SPLITS, Corpus, Split, TextDocument, text_bytes
from memorizing_transformers_pytorch.data.duplicates import near_duplicate_leaders
from memorizing_transformers_pytorch.data.hub import HuggingFaceDataset
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


class First:
    """The first documents of a corpus."""

    def __init__(self, corpus: Corpus, count: int) -> None:
        self._corpus, self._count = corpus, count

    def __iter__(self) -> Iterator[TextDocument]:
        return islice(self._corpus, self._count)

    def fingerprint(self) -> str:
        return f"{self._count} of {self._corpus.fingerprint()}"


def open_corpus(config: DataConfig, progress: bool = False) -> Corpus:
    """The corpus of `config.source`, downloaded if need be. Raises ValueError for an unknown source."""
    corpus: Corpus
    kind, _, rest = config.source.partition(":")
    if config.source == "stdlib":
        corpus = files.standard_library(config)
    elif kind == "enwik8":
        corpus = enwik8.Enwik8(Path(rest) if rest else enwik8.download_enwik8(config.cache, progress))
    elif kind == "hf":
        corpus = HuggingFaceDataset(config)
    else:
        corpus = files.folder(config) if Path(config.source).is_dir() else files.matching(config)
    return corpus if config.max_documents is None else First(corpus, config.max_documents)


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """The side of a document: by a hash of its name, so that it depends on no other document, order or seed.

    The hash, SHA-256 as a fraction of its range, puts a document into the test split below `test`, into the validation
    split in the next `valid`, else into training. A document that its corpus assigns itself stays there. Near-identical
    documents follow the one among them that `leaders` names.
    """

    valid: float
    test: float
    leaders: dict[str, str] = field(default_factory=dict)

    def __call__(self, document: TextDocument) -> Split:
        if document.split is not None:
            return document.split
        name = self.leaders.get(document.name, document.name)
        share = int.from_bytes(hashlib.sha256(text_bytes(name)).digest()[:8], "big") / 2**64
        if share < self.test:
            return "test"
        return "valid" if share < self.test + self.valid else "train"


def make_splitter(
    documents: Iterable[TextDocument], *, valid: float, test: float, near_duplicates: float | None
) -> Splitter:
    """The sides of these documents. They are read once to find near-identical ones, unless that is None.

    near_duplicates: Jaccard similarity of the sets of five words in a row (see duplicates.py), from which documents are
    kept on one side.
    """
    free = (document for document in documents if document.split is None)
    leaders = {} if near_duplicates is None else near_duplicate_leaders(free, near_duplicates)
    return Splitter(valid=valid, test=test, leaders=leaders)
