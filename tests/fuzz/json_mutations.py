"""Mutations of JSON: its values and keys, and what only its text can have (a key twice, numbers of any length)."""

from __future__ import annotations

import json
from random import Random
from typing import Any

DEEP = 10_000
ODD: tuple[str, ...] = (
    *("null", "true", "false", "0", "-1", "1", "2", "0.5", "-0.0", "1e308", "1e999", "-1e999", "NaN", "Infinity"),
    *map(str, (2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)),
    *("9" * 400, "9" * 5_000, "1000000000", '""', '"x"', '"1"', '"\\u0000"', '"\\ud800"', '"\N{SNOWMAN}"', '"../.."'),
    *("[]", "{}", "[[]]", "[null]", '[""]', '{"": {}}', "[1, 2]", "[1, 1]", "[-1, 1]", '[[0, "x"]]', '{"step": "x"}'),
    *("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 900 + "]" * 900, '"' + "x" * 70_000 + '"'),
)
_MARK = "\N{BLACK STAR}here"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Everything in a value, as container and key."""
    found, left = [], [value]
    while left:
        container = left.pop()
        keys = range(len(container)) if isinstance(container, list) else list(container)
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                left.append(container[key])
    return found


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("too deep") from error


def json_text(text: str, random: Random, odd: tuple[str, ...] = ODD) -> str:
    """One value or key of a text in JSON changed. JSON within a string (as in metadata) is gone into."""
    value = parsed(text)
    places = _places(value) if isinstance(value, dict | list) else []
    if not places or random.random() < 0.02:
        return random.choice(odd)
    container, key = random.choice(places)
    chosen = container[key]
    if isinstance(chosen, str) and chosen.startswith("{") and random.random() < 0.9:
        container[key] = json_text(chosen, random, odd)
        return json.dumps(value)
    _change(container, key, random)
    changed = json.dumps(value)
    if isinstance(container, dict) and random.random() < 0.1:  # a key twice
        changed = changed.replace("{", f"{{{json.dumps(str(key))}: {random.choice(odd)}, ", 1)
    return changed.replace(json.dumps(_MARK), random.choice(odd))


def _change(container: Any, key: Any, random: Random) -> None:
    chosen = container[key]
    match random.randrange(8):
        case 0:
            del container[key]
        case 1:
            if isinstance(container, list):
                container.insert(key, container[key])
            else:
                container[random.choice(("", "x", key + "x", *container))] = container.pop(key)
        case 2:
            other, other_key = random.choice(_places(container))
            container[key] = other[other_key] if other is container else _MARK
        case 3 if isinstance(chosen, int | float):
            container[key] = random.choice(
                (container[key] + 1, container[key] - 1, -container[key], str(container[key]))
            )
        case _:
            container[key] = _MARK


def json_file(data: bytes, random: Random) -> bytes:
    return json_text(data.decode(), random).encode()


def json_lines(data: bytes, random: Random) -> bytes:
    lines = data.decode().split("\n")
    place = random.randrange(max(len(lines) - 1, 1))
    lines[place] = json_text(lines[place], random)
    return "\n".join(lines).encode()
