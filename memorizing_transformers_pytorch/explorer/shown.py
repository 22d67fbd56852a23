"""What the page of the explorer shows, as HTML: whatever texts hold is shown, and nothing of it is obeyed."""

from __future__ import annotations

import html
from collections.abc import Iterable

from memorizing_transformers_pytorch.explorer import markup
from memorizing_transformers_pytorch.explorer.explanation import Explanation
from memorizing_transformers_pytorch.memory.documents import DocumentTable

MAX_SHOWN = 20_000  # characters of one text


def visible(text: str, most: int = MAX_SHOWN) -> str:
    """As `markup.visible`; cut if it is long."""
    cut = text if len(text) <= most else text[:most] + f" \N{HORIZONTAL ELLIPSIS} ({len(text) - most:,} more)"
    return markup.visible(cut.replace("\r\n", "\n"))


def escaped(text: str, most: int = MAX_SHOWN) -> str:
    return html.escape(visible(text, most))


def message(text: str, *, is_bad: bool = False) -> str:
    kind = "alert" if is_bad else "status"
    return f'<p class="mt-message mt-{kind}" role="{kind}">{escaped(text, 2_000)}</p>' if text else ""


def written(prompt: str, continuation: str) -> str:
    return f'<div class="mt-text"><span class="mt-prompt">{escaped(prompt)}</span>{escaped(continuation)}</div>'


def tokens(found: Explanation) -> str:
    """Each token, the darker the more of its attention went to the memory."""
    mass = found.mass_of_tokens().tolist() if found.mass.size else [0.0] * len(found.texts)
    parts = [
        f'<span style="--mass: {max(0.0, min(share, 1.0)):.3f}" title="{share:.1%} of its attention on the memory">'
        f"{escaped(text)}</span>"
        for text, share in zip(found.texts, mass, strict=True)
    ]
    legend = "The stronger the colour of a token, the more of its attention went to the memory."
    return f'<p class="mt-note">{legend}</p><div class="mt-text mt-tokens">{"".join(parts)}</div>'


def sources(found: Explanation, most: int = 20) -> str:
    """The passages that were looked up, the most important first."""
    if not found.passages:
        return message(found.no_passages)
    measured = any(each.contribution is not None for each in found.passages)
    head = ["source", "tokens", "attention", *(["worth (nats)"] if measured else []), "passage"]
    rows = []
    for each in found.passages[:most]:
        worth = [] if not measured else ["" if each.contribution is None else f"{each.contribution:+.3f}"]
        rows.append([each.title, f"{each.first}-{each.last}", f"{each.weight:.3f}", *worth, each.text])
    left = len(found.passages) - most
    more = f'<p class="mt-note">{left:,} passages with less attention are not shown.</p>' if left > 0 else ""
    return _table(head, rows, "mt-sources") + more


def documents(table: DocumentTable, most: int = 200) -> str:
    if not table:
        return message("Nothing is remembered yet.")
    rows = [[str(each.number), each.title, f"{each.tokens:,}", f"{max(each.entries, default=0):,}"] for each in table]
    left = len(table) - most
    more = f'<p class="mt-note">{left:,} older documents are not shown.</p>' if left > 0 else ""
    return _table(["number", "document", "tokens", "entries"], rows[-most:], "mt-documents") + more


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escaped(cell, 4_000)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<table class="{kind}"><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table>'
