"""HTML from templates. Every text is escaped, and shows the characters that it would hide."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from memorizing_transformers_pytorch.utils.durable import replacing

TEMPLATES = Path(__file__).parent / "templates"

# Characters that cannot be seen, or turn around what follows: controls, bidirectional formatting, surrogates, tags,
# noncharacters. Joiners stay: emoji and whole scripts are written with them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ud800-\udfff\ufdd0-\ufdef\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000))
    + "]"
)


def visible(text: str, most: int | None = None) -> str:
    """The text with an escape such as ⟨U+202E⟩ for each character that would be hidden, or hide others; cut after so
    many characters."""
    if most is not None:
        text = text.replace("\r\n", "\n")
        text = text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more)"
    if text.isascii() and text.isprintable():  # most texts, and all numbers
        return text
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def part(name: str) -> Markup:
    """A style or script, which belongs into a page as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704 (a file of this package)


def _finalize(value: Any) -> Any:
    """What every expression of a template goes through before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _digest(text: str) -> str:
    """What a Content-Security-Policy calls this style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    finalize=_finalize,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals["part"] = part
ENVIRONMENT.filters |= {"digest": _digest, "visible": visible}

shown: Any = ENVIRONMENT.get_template("app.html").module  # the parts of the page of the explorer


def write(path: Path, html: str) -> None:
    """Put a page in place of what is there, once it is whole."""
    with replacing(path) as aside:
        aside.write_text(html, encoding="utf-8")
