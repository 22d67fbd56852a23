"""`memorizing-transformers ask`: a question about what a model has read, answered with sources."""

from __future__ import annotations

from memorizing_transformers_pytorch.cli.chat import answer, begin
from memorizing_transformers_pytorch.cli.options.ask import Question
from memorizing_transformers_pytorch.cli.texts import STDIN, read_text


def main(options: Question) -> None:
    """Run `ask`. Raises ValueError for bad input."""
    question = read_text(STDIN) if options.question == STDIN else options.question
    if not question.strip():
        raise ValueError("the question is empty: type it after the options")
    answer(begin(options), question.strip(), options)
