"""Progress bars on stderr. Where that is no terminal but a log file, they are written seldom."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A bar with the options of tqdm."""
    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 10, **options)
