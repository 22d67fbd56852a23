"""HTML out of what is not to be trusted: every text is escaped, isolated, and shows what it would hide.

What other modules join is HTML already; `shown` makes it of a text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files

# Characters that cannot be seen, or turn around what follows: controls, bidirectional formatting, surrogates, tags,
# noncharacters. Joiners stay: emoji and whole scripts are written with them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ud800-\udfff\ufdd0-\ufdef\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000))
    + "]"
)


def visible(text: str) -> str:
    """The text with an escape such as ⟨U+202E⟩ for each character that would be hidden, or hide others."""
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def shown(text: str) -> str:
    """HTML of any text, also as the value of an attribute."""
    return html.escape(visible(text))


def isolated(text: str) -> str:
    """The same, so that its direction changes nothing around it."""
    return f"<bdi>{shown(text)}</bdi>"


def bar(share: float) -> str:
    """A share as a bar, beside which the number stands."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        '<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="8"/><rect class="full" width="{width:.1f}" height="8"/></svg>'
    )


def cell(content: str) -> str:
    return f"<td>{content}</td>"


def number(value: float | None, form: str = "{:.3f}", before: str = "") -> str:
    """A cell with a number, or none where it is not known."""
    known = value is not None and value == value
    return f'<td class="number">{before}{form.format(value) if known else "-"}</td>'


def table(caption: str, head: Sequence[str], rows: Iterable[str]) -> str:
    """A table that scrolls by itself where it is too wide. rows: the cells of each, or whole rows."""
    lines = "".join(row if row.startswith("<tr") else f"<tr>{row}</tr>" for row in rows)
    names = "".join(f'<th scope="col">{shown(name)}</th>' for name in head)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{shown(caption)}"><table>'
        f"<caption>{shown(caption)}</caption>"
        f"<thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def whole_page(title: str, body: str) -> str:
    """One file that loads nothing, and in which nothing runs but its own script."""
    style, script = _part("page.css"), _part("page.js")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        'content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{shown(title)}</title><style>{style}</style></head>\n<body>{body}\n"
        f"<script>{script}</script></body></html>\n"
    )


def _part(name: str) -> str:
    # A browser reads line ends as \n before it takes the hash.
    return (files(__package__) / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
