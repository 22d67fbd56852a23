"""Values that are others inside a `with` block, for the thread or task that runs it alone.

Threads that are started inside such a block do not inherit its values; `contextvars.copy_context().run` passes them on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

Key = tuple[int, str]
"""The `id` of an object, and the name of a value of it."""

_values: ContextVar[Mapping[Key, Any]] = ContextVar("_values", default=MappingProxyType({}))


@contextmanager
def setting(owner: object, name: str, value: Any) -> Iterator[None]:
    """Inside, `current(owner, name)` gives this value."""
    token = _values.set({**_values.get(), (id(owner), name): value})
    try:
        yield
    finally:
        _values.reset(token)


def current(owner: object, name: str, default: Any = None) -> Any:
    """The value set by the innermost `setting` that this thread or task is in, or the default."""
    return _values.get().get((id(owner), name), default)
