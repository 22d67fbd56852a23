"""JSON that somebody else may have written: whatever is wrong with it is a ValueError that says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a text. Raises ValueError for what is no JSON in UTF-8, or nested too deeply to be read."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {where}, got an error: {error}") from error


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The same of a text that is an object. Raises ValueError for other values too."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object in {where}, got {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ValueError where there is none, OSError where the file cannot be read."""
    return parse_object(path.read_bytes(), repr(str(path)))
