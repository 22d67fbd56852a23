"""An explanation as one HTML file that needs nothing else: the text, where each token looked, and the sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from memorizing_transformers_pytorch.explorer.explanation import Explanation, LookedUpEntry
from memorizing_transformers_pytorch.explorer.markup import (
    bar,
    cell,
    isolated,
    number,
    shown,
    table,
    whole_page,
)
from memorizing_transformers_pytorch.utils.durable import replacing

ENTRIES, PASSAGES = 8, 200  # that are written, of each token and in all
HEADS = 16  # of which the best entry is written too
SECTIONS = {"text": "The text", "passages": "Passages", "sources": "Sources", "layers": "Layers", "tokens": "By token"}
_HEAD = ("weight", "source", "layer", "head", "score", "age")


def write_page(found: Explanation, path: Path, title: str = "What the model looked up") -> None:
    """Write the page in place of what is there, once it is whole."""
    with replacing(path) as aside:
        aside.write_text(page(found, title), encoding="utf-8")


def page(found: Explanation, title: str = "What the model looked up") -> str:
    """The page. Of each token the 8 entries with the largest weights are written, and the best of each head; of the
    passages, the 200 most important."""
    links = "".join(f'<li><a href="#{name}">{words}</a></li>' for name, words in SECTIONS.items())
    nav = f'<nav aria-label="On this page"><ul>{links}</ul></nav>'
    body = f"<header><h1>{shown(title)}</h1>{nav}</header><main>{sections(found)}</main>"
    return whole_page(title, body)


def sections(found: Explanation) -> str:
    """What a page says of an explanation, in parts that `SECTIONS` names."""
    parts = _Parts(found)
    written = (parts.text(), parts.passages(), parts.sources(), parts.layers(), parts.tokens())
    return "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{words}</h2>{part}</section>'
        for (name, words), part in zip(SECTIONS.items(), written, strict=True)
    )


class _Parts:
    def __init__(self, found: Explanation) -> None:
        self._found = found
        self._masses = found.mass_of_tokens()
        self._of_token = found.rows_by_token()
        self._texts: dict[tuple[int, int, int], str] = {}
        self._passages = found.passages[:PASSAGES]
        self._size = self._passages[0].last - self._passages[0].first + 1 if self._passages else 1
        self._number_of = {(each.document, each.first // self._size): i for i, each in enumerate(self._passages)}

    def text(self) -> str:
        found, peak = self._found, float(self._masses.max())
        steps = "".join(f'<span class="token m{step}">&nbsp;{step * 10}&nbsp;</span>' for step in range(0, 11, 2))
        legend = (
            f'<p class="legend"><span>Colour and underline: attention on the memory, in % of the largest share, '
            f'<span id="scale">{peak:.1%}</span></span><span>{steps}</span></p>'
        )
        tokens = "".join(self._token(i) for i in range(len(found.texts)))
        heads = found.mass.shape[1]
        return (
            f"{self._summary()}{self._choice()}{legend}"
            f'<div class="reading"><div class="tokens" dir="auto" role="group" aria-label="The tokens of the text">'
            f'{tokens}</div><div class="panel scripted" id="panel" data-heads="{heads}" role="region" tabindex="-1" '
            'aria-label="Where the token looked" hidden></div></div>'
        )

    def _summary(self) -> str:
        found = self._found
        losses = ""
        if len(found.texts) > 1:
            own, alone = float(np.nanmean(found.losses)), float(np.nanmean(found.without_memory))
            losses = f" Loss: {own:.3f} nats per token; with an empty memory {alone:.3f}."
        return (
            f"<p>{len(found.texts):,} tokens, {len(found):,} entries looked up, {self._masses.mean():.1%} of the "
            f'attention on the memory.{losses}</p><p class="quiet">Each token links to where it looked. '
            f'<span class="scripted" hidden>Point at one, or walk with the arrow keys; Enter or a click keeps it, '
            "Escape leads back.</span></p>"
        )

    def _choice(self) -> str:
        layers = "".join(f'<option value="{layer}">{layer}</option>' for layer in self._found.layers)
        heads = "".join(f'<option value="{head}">{head}</option>' for head in range(self._found.mass.shape[1]))
        return (
            '<div class="choice scripted" hidden><label>Layer <select id="layer"><option value="all">all</option>'
            f'{layers}</select></label><label>Head <select id="head"><option value="all">all</option>{heads}</select>'
            "</label></div>"
        )

    def _token(self, i: int) -> str:
        found, peak = self._found, self._masses.max()
        level = round(10 * float(self._masses[i] / peak)) if peak > 0 else 0
        masses = " ".join(str(round(1000 * float(mass))) for mass in found.mass[:, :, i].flat)
        return (
            f'<a class="token m{level}" id="w{i}" href="#t{i}" title="{self._facts(i)}" data-mass="{masses}">'
            f"{_token_text(found.texts[i])}</a>"
        )

    def _facts(self, i: int) -> str:
        found, facts = self._found, f"{self._masses[i]:.1%} of the attention on the memory"
        if np.isnan(found.losses[i]):
            return facts
        return f"{facts}; loss {found.losses[i]:.3f}, with an empty memory {found.without_memory[i]:.3f}"

    def passages(self) -> str:
        if not self._passages:
            return f"<p>{self._found.no_passages}</p>"
        left = len(self._found.passages) - len(self._passages)
        more = f"<p>{left:,} more passages with less of either are not written.</p>" if left > 0 else ""
        note = (
            "<p>Weight: the attention that a passage got, summed over tokens, as a mean over layers and heads. "
            "Contribution, where it was measured: by how many nats the loss of the whole text rises without the "
            "passage. Attention tells where a model looks, contribution whether it helps.</p>"
        )
        return note + "".join(self._passage(i) for i in range(len(self._passages))) + more

    def _passage(self, i: int) -> str:
        each = self._passages[i]
        worth = "" if each.contribution is None else f"; contribution {each.contribution:+.3f}"
        return (
            f'<article id="p{i}" tabindex="-1"><h3>{isolated(each.title)}, {each.first:,} to {each.last:,}</h3>'
            f'<p>weight {each.weight:.3f}{worth}{self._readers(i)}</p><bdi class="quote">'
            f"{shown(each.text)}</bdi></article>"
        )

    def _readers(self, i: int) -> str:
        """Links to the tokens that looked there most."""
        each, columns = self._passages[i], self._found.columns
        own = (columns["document"] == each.document) & (columns["position"] // self._size == each.first // self._size)
        weights = np.bincount(columns["token"][own], columns["weight"][own])
        most = [int(token) for token in np.argsort(-weights, kind="stable")[:ENTRIES] if weights[token] > 0]
        links = ", ".join(f'<a href="#w{token}">{_named(self._found.texts[token])} ({token})</a>' for token in most)
        return f"; most from {links}" if links else ""

    def sources(self) -> str:
        documents = self._found.by_document()
        total = sum(each["weight"] for each in documents) or 1.0
        rows = [
            cell(isolated(each["title"]))
            + number(each["entries"], "{:,}")
            + number(each["weight"], before=bar(each["weight"] / total))
            for each in documents
        ]
        return table("What was looked up, by source", ("source", "entries", "attention"), rows)

    def layers(self) -> str:
        rows = []
        for each in self._found.by_layer():
            layer, mass = each["layer"], each["mass"]
            rows.append(cell(f"layer {layer}") + cell("mean") + number(mass, "{:.1%}", bar(mass)))
            for head, share in enumerate(each["heads"]):
                cells = cell(f"layer {layer}") + cell(f"head {head}") + number(share, "{:.1%}", bar(share))
                rows.append(f'<tr data-layer="{layer}" data-head="{head}">{cells}</tr>')
        return table("Attention on the memory, a mean over tokens", ("layer", "head", "share"), rows)

    def tokens(self) -> str:
        note = (
            f"<p>Of each token the {ENTRIES} entries with the largest weights are written, and the best of each head "
            f"(of at most {HEADS} heads). Age: how many tokens or entries lie between.</p>"
        )
        return note + "".join(map(self._details, range(len(self._found.texts))))

    def _details(self, i: int) -> str:
        entries = [self._found.entry(int(row)) for row in self._written(i)]
        rows = table(f"Where token {i} looked", _HEAD, map(self._row, entries)) if entries else "<p>Nowhere.</p>"
        return (
            f"<details><summary>{i}: {_named(self._found.texts[i])}: {self._facts(i)}</summary>"
            f'<div id="t{i}">{rows}</div></details>'
        )

    def _written(self, token: int) -> Iterator[int]:
        """Rows of the table: the best of a token, and the best of each head."""
        own, columns, heads = self._of_token[token], self._found.columns, set[tuple[int, int]]()
        for rank, row in enumerate(own.tolist()):
            head = columns["layer"][row].item(), columns["head"][row].item()
            if rank < ENTRIES or (head not in heads and len(heads) < HEADS):
                yield row
            heads.add(head)

    def _row(self, entry: LookedUpEntry) -> str:
        where = f"{isolated(entry.title)}, {entry.position:,}" if entry.position >= 0 else isolated(entry.title)
        passage = self._number_of.get((entry.document, entry.position // self._size))
        link = where if passage is None else f'<a href="#p{passage}">{where}</a>'
        return (
            f'<tr data-layer="{entry.layer}" data-head="{entry.head}">{number(entry.weight)}'
            f'<td class="source">{link}{self._quoted(entry)}</td>'
            f"{number(entry.layer, '{}')}{number(entry.head, '{}')}{number(entry.score)}"
            f"{number(entry.age, '{:,}')}</tr>"
        )

    def _quoted(self, entry: LookedUpEntry) -> str:
        """The text around an entry, with the entry marked where its text is part of it."""
        key = entry.document, entry.position, entry.source_token
        if key not in self._texts:
            found, around = self._found, self._found.around
            first = max(entry.position - around, 0)
            before = found.text(entry.document, first, entry.position - 1)
            own = found.text(entry.document, entry.position, entry.position)
            after = entry.text[len(before) + len(own) :]
            is_part = own and before + own + after == entry.text
            marked = f"{shown(before)}<mark>{shown(own)}</mark>{shown(after)}" if is_part else shown(entry.text)
            self._texts[key] = f'<bdi class="quote">{marked}</bdi>'
        return self._texts[key]


def _token_text(text: str) -> str:
    """A token that is but part of a character can be pointed at, and a line that one ends can be seen."""
    return shown(text).replace("\n", "↵\n") if text else "·"


def _named(text: str) -> str:
    """A token among other words, where white space alone would not be seen."""
    return isolated(text if text.strip() else text.replace(" ", "␣").replace("\n", "↵") or "·")
