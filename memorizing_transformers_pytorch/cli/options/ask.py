"""The options of `ask`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments
from memorizing_transformers_pytorch.cli.options.chat import Talk


@dataclass(frozen=True, kw_only=True)
class Question(Talk):
    """Ask a model about what it has read, and see the passages on which the answer stands."""

    question: tyro.conf.Positional[str]
    """What to ask; - reads it from standard input."""


parse = functools.partial(parse_arguments, Question)
