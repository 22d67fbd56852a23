"""What was looked up for some tokens, as a table; and what it is worth, by source.

Shapes: N rows of the table, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from memorizing_transformers_pytorch.explorer.markup import ENVIRONMENT
from memorizing_transformers_pytorch.explorer.sources import Sources, is_known

Columns = Mapping[str, np.ndarray]


class LookedUpEntry(NamedTuple):
    """One entry that one head of one layer found for one token.

    token: which of the explained ones. weight: the attention on it, of 1. score: the inner product of query and key.
    document: the number of its source, -1 where unknown; title: its title. position: in that document.
    source_token: the id of the token that it was made of, -1 where unknown. text: what stands around it; of an unknown
    source, that token alone. age: how many tokens or entries lie between.
    """

    token: int
    layer: int
    head: int
    score: float
    weight: float
    document: int
    title: str
    position: int
    source_token: int
    text: str
    age: int


@dataclass(frozen=True)
class Passage:
    """A piece of a source. first, last: positions in the document. weight: the attention that it got, added up over
    tokens and as a mean over layers and heads. contribution: by how much (nats, all tokens together) the loss of the
    explained tokens would be higher without it; None where that was not measured. score: how well a passage that was
    recalled fits the tokens by which it was found; None of a memory of tokens."""

    document: int
    title: str
    first: int
    last: int
    text: str
    weight: float
    contribution: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class Block:
    """Which of the explained tokens, `first` to `last`, were predicted with the same passages of a memory of passages
    before them. passages: these, in the order in which they stood; their weights are those of this block."""

    first: int
    last: int
    passages: list[Passage]


@dataclass(frozen=True)
class Explanation:
    """What a model looked up. Iterating gives `LookedUpEntry`s, the largest weight first.

    texts: each explained token as text. losses: (T,) in nats, the first NaN. without_memory: the same with an empty
    memory. mass: (L, H, T), the share of attention on the memory. layers: their numbers (L,). titles: of documents.
    columns: the table: token, layer, head, score, weight, document, position, source_token, age (N,). passages: the
    sources, the most important first. around: how many tokens of the source the text of an entry shows on either side.

    Of a memory of passages, blocks: which passages stood before which tokens. Its table has a row for each token,
    layer, head and passage: weight is the attention on all of the passage, position the place in it that got most, and
    score that of the passage. The losses of a prompt are NaN, since it has chosen the passages.
    """

    texts: list[str]
    losses: np.ndarray
    without_memory: np.ndarray
    layers: list[int]
    mass: np.ndarray
    titles: Mapping[int, str]
    columns: Columns
    passages: list[Passage]
    sources: Sources = field(repr=False)
    starts: Mapping[int, int] = field(repr=False)
    around: int = 12
    blocks: list[Block] | None = None
    _texts: dict[tuple[int, int, int], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.columns["token"])

    def __iter__(self) -> Iterator[LookedUpEntry]:
        return (self.entry(int(i)) for i in self._best())

    def entry(self, i: int) -> LookedUpEntry:
        """Row i of the table."""
        row = {name: column[i].item() for name, column in self.columns.items()}
        text = self._text_of(row["document"], row["position"], row["source_token"])
        return LookedUpEntry(**row, title=self.title(row["document"]), text=text)

    def _text_of(self, document: int, position: int, source_token: int) -> str:
        """Of an entry. Many tokens and heads find the same entries: each is decoded once."""
        key = document, position, source_token
        if key not in self._texts:
            known = is_known(document, position)
            alone = self.sources.alone
            self._texts[key] = self.text(document, position, position, self.around) if known else alone(source_token)
        return self._texts[key]

    def _best(self, of_each_token: int | None = None) -> np.ndarray:
        """Rows of the table, the largest weight first; of each token at most this many."""
        weights = self.columns["weight"]
        if of_each_token is None:
            return np.argsort(-weights, kind="stable")
        rows = np.concatenate([own[:of_each_token] for own in self.rows_by_token()])
        return rows[np.argsort(-weights[rows], kind="stable")]

    def rows_by_token(self) -> list[np.ndarray]:
        """Of each token its rows of the table, the largest weight first."""
        order = np.lexsort((-self.columns["weight"], self.columns["token"]))
        ends = np.searchsorted(self.columns["token"][order], np.arange(len(self.texts) + 1))
        return [order[first:last] for first, last in pairwise(ends)]

    @property
    def no_passages(self) -> str:
        """The reason why there are no passages."""
        if self.blocks is not None:
            return "No passages stood before the text."
        return "What was looked up is of no known document." if len(self) else "Nothing was looked up."

    def title(self, document: int) -> str:
        return self.titles.get(document, f"document {document}" if document >= 0 else "unknown")

    def text(self, document: int, first: int, last: int, around: int = 0) -> str:
        """The text of a document between two positions (both included), and `around` tokens on either side."""
        start = self.starts.get(document, 0)
        return self.sources.text(document, start + max(first - around, 0), start + last + around)

    def of_token(self, token: int, count: int = 10) -> list[LookedUpEntry]:
        """The entries with the largest weights that were found for a token."""
        return [self.entry(int(i)) for i in self.rows_by_token()[token][:count]]

    def mass_of_tokens(self) -> np.ndarray:
        """(T,): the share of attention on the memory, as a mean over layers and heads."""
        return self.mass.mean(axis=(0, 1)) if self.mass.size else np.zeros(len(self.texts))

    def by_document(self) -> list[dict[str, Any]]:
        """Of each source: how many entries were looked up, and how much attention they got."""
        numbers, own, counts = np.unique(self.columns["document"], return_inverse=True, return_counts=True)
        weights = np.bincount(own, self.columns["weight"], minlength=len(numbers))
        found = [
            {"document": document, "title": self.title(document), "entries": count, "weight": self._share(weight)}
            for document, count, weight in zip(numbers.tolist(), counts.tolist(), weights, strict=True)
        ]
        return sorted(found, key=lambda each: -each["weight"])

    def by_layer(self) -> list[dict[str, Any]]:
        """Of each layer: the share of attention on the memory, as a mean over tokens, and that of each head."""
        return [
            {"layer": layer, "mass": float(mass.mean()), "heads": mass.mean(axis=1).tolist()}
            for layer, mass in zip(self.layers, self.mass, strict=True)
        ]

    def _share(self, total: float) -> float:
        heads = self.mass.shape[0] * self.mass.shape[1]
        return float(total) / heads if heads else 0.0

    def to_dicts(self, count: int | None = None, *, of_each_token: int | None = None) -> list[dict[str, Any]]:
        """The entries with the largest weights, as for JSON; by default all, or `count`, or some of each token."""
        return [self.entry(int(i))._asdict() for i in islice(self._best(of_each_token), count)]

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a row for each entry, the largest weight first, if pandas is installed."""
        import pandas as pd  # type: ignore[import-untyped, unused-ignore]

        order = self._best()
        columns: dict[str, Any] = {name: column[order] for name, column in self.columns.items()}
        places = (columns[name].tolist() for name in ("document", "position", "source_token"))
        columns["text"] = list(map(self._text_of, *places))
        columns["title"] = list(map(self.title, columns["document"].tolist()))
        return pd.DataFrame(columns, columns=LookedUpEntry._fields)

    @property
    def summary(self) -> str:
        """In a sentence."""
        mass = f"{self.mass_of_tokens().mean():.1%} of the attention on the memory"
        if self.blocks is None:
            return f"{len(self.texts)} tokens, {len(self):,} entries looked up in layers {self.layers}; {mass}"
        scored = int((~np.isnan(self.losses)).sum())
        losses = f"{np.nansum(self.losses):.3f}, without any passages {np.nansum(self.without_memory):.3f}"
        return f"{len(self.texts)} tokens; {mass}; loss of the last {scored} tokens {losses}"

    def __str__(self) -> str:
        lines = [self.summary]
        if self.blocks:
            lines.append(f"written: {''.join(self.texts[self.blocks[0].first :]).strip()}")
        for block in self.blocks or []:
            stood = ", ".join(f"{p.title} {p.first}-{p.last} (score {p.score:.2g})" for p in block.passages)
            lines.append(f"tokens {block.first}-{block.last} came after {stood or 'no passages'}")
        for each in self.passages[:10]:
            worth = "" if each.contribution is None else f", lowers the loss by {each.contribution:.3f}"
            lines.append(
                f"{each.weight:.3f}{worth}: {each.title} {each.first}-{each.last}: {' '.join(each.text.split())}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return ENVIRONMENT.get_template("notebook.html").render(summary=self.summary, passages=self.passages[:20])

    def passages_by(self, size: int) -> list[Passage]:
        """The pieces of `size` tokens of known sources that were looked up (of a memory of passages, these), those with
        the most attention first."""
        columns, passages = self.columns, []
        if self.blocks is not None:
            totals = [columns["weight"][self.within(each)].sum() for each in self.passages]
            weighed = [replace(p, weight=self._share(total)) for p, total in zip(self.passages, totals, strict=True)]
            return sorted(weighed, key=lambda each: -each.weight)
        known = is_known(columns["document"], columns["position"])
        keys = np.stack((columns["document"][known], columns["position"][known] // size), axis=1)
        pieces, own = np.unique(keys, axis=0, return_inverse=True)
        weights = np.bincount(own.reshape(-1), columns["weight"][known], minlength=len(pieces))
        for i in np.argsort(-weights, kind="stable").tolist():
            document, piece = pieces[i].tolist()
            first, last = piece * size, (piece + 1) * size - 1
            text, weight = self.text(document, first, last), self._share(weights[i])
            passages.append(Passage(document, self.title(document), first, last, text, weight))
        return passages

    def within(self, passage: Passage) -> np.ndarray:
        """(N,) bool: which rows of the table are of a passage."""
        positions = self.columns["position"]
        inside: np.ndarray = (passage.first <= positions) & (positions <= passage.last)
        inside &= self.columns["document"] == passage.document
        return inside

    def marked(self, passage: Passage) -> list[tuple[str, float]]:
        """The text of a passage in pieces, and how much attention each got: 1 for the piece with most."""
        start = self.starts.get(passage.document, 0)
        tokens = self.sources.tokens(passage.document, start + passage.first, start + passage.last)
        if tokens is None:
            return [(passage.text, 0.0)]
        own = self.within(passage)
        positions = self.columns["position"][own].astype(np.int64) - passage.first
        weights = np.bincount(positions, self.columns["weight"][own], minlength=len(tokens))
        shares = weights / max(float(weights.max()), float(np.finfo(np.float32).tiny))
        return list(zip(self.sources.pieces(tokens), shares.tolist(), strict=True))

    def only(self, size: int, layer: int | None = None, head: int | None = None) -> Explanation:
        """What one layer or one head found; heads have the same numbers in every layer. size: tokens of a passage. The
        contributions of passages stay: they were measured with all layers and heads."""
        if layer is None and head is None:
            return self
        kept, mass, layers = np.ones(len(self), dtype=bool), self.mass, self.layers
        if layer is not None:
            kept &= self.columns["layer"] == layer
            mass, layers = mass[[number == layer for number in layers]], [each for each in layers if each == layer]
        if head is not None:
            kept &= self.columns["head"] == head
            mass = mass[:, head : head + 1]
        columns = {name: column[kept] for name, column in self.columns.items()}
        part = replace(self, mass=mass, layers=layers, columns=columns)
        worth = {(each.document, each.first): each.contribution for each in self.passages}
        passages = part.passages_by(size)
        return replace(part, passages=[replace(p, contribution=worth.get((p.document, p.first))) for p in passages])
