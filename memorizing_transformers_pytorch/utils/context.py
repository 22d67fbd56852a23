"""Values that are others inside a `with` block, for the thread or task that runs it alone.

Threads that are started inside such a block do not inherit its values; `contextvars.copy_context().run` passes them on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_values: ContextVar[Mapping[PerContext[Any], Any]] = ContextVar("_values", default=MappingProxyType({}))


class PerContext(Generic[T]):
    """A value of the thread or task that has set it; all others see the usual one."""

    def __init__(self, usual: T) -> None:
        self._usual = usual

    @property
    def now(self) -> T:
        found: T = _values.get().get(self, self._usual)
        return found

    def put(self, value: T) -> None:
        others = {key: each for key, each in _values.get().items() if key is not self}
        _values.set(others if value is self._usual else {**others, self: value})

    @contextmanager
    def at(self, value: T) -> Iterator[None]:
        """Inside, this value."""
        before = self.now
        self.put(value)
        try:
            yield
        finally:
            self.put(before)
