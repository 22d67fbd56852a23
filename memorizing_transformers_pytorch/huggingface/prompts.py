"""A conversation as the prompt of a model, with what was recalled for a message in that message, as in RAG.

Shapes: N tokens of a prompt or question, P of a passage, M that were written.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memorizing_transformers_pytorch.huggingface.texts import document_tokens

QUESTION, ANSWER = "Question:", "Answer:"
ANSWER_FROM_TEXT = "Answer from the text, in a few words."  # SmolLM2-135M answers twice as many questions with it
BETWEEN = "\n...\n"
BEGINS = {"user": f"{QUESTION} ", "assistant": f"{ANSWER} ", "system": ""}
FIRST_WORDS = 10


@dataclass(frozen=True)
class Excerpt:
    """A part of a document that was recalled.

    document, title: of the document. position: of its first token in the document. text: None without a tokenizer.
    score: how well it fits; comparable within one call. tokens: (P,) its token ids.
    """

    document: int
    title: str
    position: int
    text: str | None
    score: float
    tokens: Tensor

    def __str__(self) -> str:
        words = (self.text or "").split()
        shown = " ".join(words[:FIRST_WORDS]) + (" ..." if len(words) > FIRST_WORDS else "")
        return f"{self.title}, token {self.position:,}: {shown}"


class Placed(NamedTuple):
    """A passage in a prompt, and at which token of it the passage begins."""

    passage: Excerpt
    start: int


@dataclass(frozen=True, eq=False)
class Asked:
    """What a model was given and has written.

    row: of the memory. prompt: (N,). question: (N,), by which passages were found. placed: the passages in the prompt;
    None if they stood before it, in the cache. written: (M,).
    """

    row: int
    prompt: Tensor
    question: Tensor
    placed: list[Placed] | None
    written: Tensor


class Turn(NamedTuple):
    """A message of a conversation, and the passages that it begins with, the best first."""

    role: str
    content: str
    passages: Sequence[Excerpt] = ()


def prompt_of(turns: Sequence[Turn], tokenizer: Any) -> tuple[Tensor, list[Placed]]:
    """A conversation by the chat template, or else as "Question: ... Answer:" -> its token ids (N,), and where the
    passages lie in them. They keep the tokens that were read; the best one comes last."""
    passages = [each for turn in turns for each in reversed(turn.passages)]
    mark, has_template = uuid.uuid4().hex, bool(getattr(tokenizer, "chat_template", None))
    marks = (f"{mark}-{i}-" for i in range(len(passages)))
    texts = [BETWEEN.join(next(marks) for _ in turn.passages) for turn in turns]
    openings = [f"Text:\n{text}\n\n" if text else "" for text in texts]
    written = _by_template(turns, openings, tokenizer) if has_template else _plainly(turns, openings)
    first, *rest = re.split(f"{mark}-([0-9]+)-", written)
    parts, placed = [_tokens(first, tokenizer) if has_template else document_tokens(first, tokenizer)], list[Placed]()
    for number, after in zip(rest[::2], rest[1::2], strict=True):
        placed.append(Placed(passages[int(number)], sum(map(len, parts))))
        parts += [placed[-1].passage.tokens, _tokens(after, tokenizer)]
    return torch.cat(parts), placed


def _by_template(turns: Sequence[Turn], openings: Sequence[str], tokenizer: Any) -> str:
    said = zip(turns, openings, strict=True)
    messages = [{"role": turn.role, "content": opening + turn.content} for turn, opening in said]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _plainly(turns: Sequence[Turn], openings: Sequence[str]) -> str:
    said = zip(turns, openings, strict=True)
    return "\n".join([*(opening + BEGINS[turn.role] + turn.content for turn, opening in said), ANSWER])


def _tokens(text: str, tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
