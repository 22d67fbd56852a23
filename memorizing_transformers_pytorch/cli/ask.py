"""`memorizing-transformers ask`: a question about what a model has read, answered with sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from memorizing_transformers_pytorch.cli.arguments import parse_arguments
from memorizing_transformers_pytorch.cli.chat import Talk, answer, begin
from memorizing_transformers_pytorch.cli.texts import STDIN, read_text


@dataclass(frozen=True, kw_only=True)
class Question(Talk):
    """Ask a model about what it has read, and see the passages on which the answer stands."""

    question: tyro.conf.Positional[str]
    """What to ask; - reads it from standard input."""


def main(arguments: Sequence[str], program: str) -> None:
    """Run `ask` with these arguments. Raises ValueError for bad input."""
    options = parse_arguments(Question, arguments, program)
    question = read_text(STDIN) if options.question == STDIN else options.question
    if not question.strip():
        raise ValueError("the question is empty: type it after the options")
    answer(begin(options), question.strip(), options)
