"""Configurations as plain data: presets, YAML files, the copy that a run keeps, and how two of them differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dacite
import yaml

from memorizing_transformers_pytorch.training.config import RunConfig

Plain = dict[str, Any]


def _float(value: Any) -> float:
    """YAML reads some numbers, such as 1e-3, as text."""
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        raise ValueError(f"expected a number, got {value!r}") from None


_STRICT = dacite.Config(strict=True, cast=[tuple, Path], type_hooks={float: _float})


def to_plain(config: Any) -> Plain:
    """A configuration as nested dicts of values that YAML and JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in dataclasses.asdict(config).items()}


def from_plain(plain: Mapping[str, Any]) -> RunConfig:
    """The inverse. Raises ValueError for fields that are unknown, missing, of another type or have bad values."""
    try:
        return dacite.from_dict(RunConfig, plain, _STRICT)
    except dacite.DaciteError as error:
        raise ValueError(f"expected the fields of a run, got: {error}") from None
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith("expected "):  # a field has refused its value
            raise
        raise ValueError(f"expected values of the right types, got: {error}") from None


_DEEPEST = 20
# For a value that does not fit its tag, such as !!int '', the parser raises whatever error that leads to.
_OF_YAML = (
    ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError, yaml.YAMLError,
)  # fmt: skip


def read_yaml(path: Path) -> Plain:
    """A YAML mapping. Raises ValueError for other files, and for YAML with aliases or deep nesting."""
    try:
        text = path.read_text(encoding="utf-8")
        _expect_simple(text)
        plain = yaml.safe_load(text)
    except _OF_YAML as error:
        raise ValueError(f"expected a YAML file, got {str(path)!r}: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"expected a mapping in {str(path)!r}, got {type(plain).__name__}")
    return plain


def _expect_simple(text: str) -> None:
    """Refuse aliases, which can expand to more than fits into memory, and deep nesting, which takes quadratic time."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has aliases (*name), or more than {_DEEPEST} levels")


def write_yaml(config: RunConfig, path: Path) -> None:
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False), encoding="utf-8")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Plain:
    """`base` with `changes` laid over it, mapping by mapping."""
    both = dict(base)
    for name, value in changes.items():
        inner = both.get(name)
        both[name] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return both


def differences(left: RunConfig, right: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The fields, by their full names, in which two configurations differ, with both values."""
    one, other = dict(_flat(to_plain(left))), dict(_flat(to_plain(right)))
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


def _flat(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
