"""An explanation as one HTML file that needs nothing else: the text, where each token looked, and the sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memorizing_transformers_pytorch.explorer.explanation import Explanation, LookedUpEntry, Passage
from memorizing_transformers_pytorch.explorer.markup import ENVIRONMENT, write

ENTRIES, PASSAGES = 8, 200  # that are written, of each token and in all
HEADS = 16  # of which the best entry is written too
SECTIONS = {"text": "The text", "passages": "Passages", "sources": "Sources", "layers": "Layers", "tokens": "By token"}
TITLE = "What the model looked up"


def write_page(found: Explanation, path: Path, title: str = TITLE) -> None:
    """Write the page in place of what is there, once it is whole."""
    write(path, page(found, title))


def page(found: Explanation, title: str = TITLE) -> str:
    """The page. Of each token the 8 entries with the largest weights are written, and the best of each head; of the
    passages, the 200 most important."""
    return ENVIRONMENT.get_template("page.html").render(title=title, sections=SECTIONS, view=View(found))


class _Token(NamedTuple):
    """number: its place in the text. text: as it is shown there; name: among other words. level: of colour, 0 to 10.
    masses: of each layer and head, in thousandths. facts: a sentence."""

    number: int
    text: str
    name: str
    level: int
    masses: str
    facts: str


class View:
    """What the template shows of an explanation."""

    ENTRIES, HEADS = ENTRIES, HEADS

    def __init__(self, found: Explanation) -> None:
        self.found = found
        masses = found.mass_of_tokens()
        self.peak, self.mean_mass = float(masses.max()), float(masses.mean())
        self.tokens = [self._token(i, float(masses[i])) for i in range(len(found.texts))]
        scored = not np.isnan(found.losses).all()
        self.losses = [float(np.nanmean(each)) for each in (found.losses, found.without_memory)] if scored else []
        self.passages = found.passages[:PASSAGES]
        self.left = len(found.passages) - len(self.passages)
        places = ((i, each.document, range(each.first, each.last + 1)) for i, each in enumerate(self.passages))
        self._number_of = {(document, place): i for i, document, own in places for place in own}
        self._rows = found.rows_by_token()
        self._quotes: dict[tuple[int, int, int], tuple[str, str, str]] = {}

    def _token(self, i: int, mass: float) -> _Token:
        found, text = self.found, self.found.texts[i]
        facts = f"{mass:.1%} of the attention on the memory"
        if not np.isnan(found.losses[i]):
            facts += f"; loss {found.losses[i]:.3f}, with an empty memory {found.without_memory[i]:.3f}"
        return _Token(
            number=i,
            text=text.replace("\n", "↵\n") or "·",  # a token may be but part of a character
            name=text if text.strip() else text.replace(" ", "␣").replace("\n", "↵") or "·",
            level=round(10 * mass / self.peak) if self.peak > 0 else 0,
            masses=" ".join(str(round(1000 * float(each))) for each in found.mass[:, :, i].flat),
            facts=facts,
        )

    def readers(self, passage: Passage) -> list[int]:
        """The tokens that looked there most."""
        columns, own = self.found.columns, self.found.within(passage)
        weights = np.bincount(columns["token"][own], columns["weight"][own])
        return [int(token) for token in np.argsort(-weights, kind="stable")[:ENTRIES] if weights[token] > 0]

    def entries(self, token: int) -> Iterator[LookedUpEntry]:
        """The best of a token, and the best of each head."""
        columns, heads = self.found.columns, set[tuple[int, int]]()
        for rank, row in enumerate(self._rows[token].tolist()):
            head = columns["layer"][row].item(), columns["head"][row].item()
            if rank < ENTRIES or (head not in heads and len(heads) < HEADS):
                yield self.found.entry(row)
            heads.add(head)

    def passage_of(self, entry: LookedUpEntry) -> int | None:
        return self._number_of.get((entry.document, entry.position))

    def quote(self, entry: LookedUpEntry) -> tuple[str, str, str]:
        """The text around an entry: what comes before it, the entry where its text is part of it, what comes after."""
        key = entry.document, entry.position, entry.source_token
        if key not in self._quotes:
            found, first = self.found, max(entry.position - self.found.around, 0)
            before = found.text(entry.document, first, entry.position - 1)
            own = found.text(entry.document, entry.position, entry.position)
            after = entry.text[len(before) + len(own) :]
            is_part = own and before + own + after == entry.text
            self._quotes[key] = (before, own, after) if is_part else (entry.text, "", "")
        return self._quotes[key]
