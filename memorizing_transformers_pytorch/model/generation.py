"""Continue a text, with memory that keeps growing.

Shapes: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Generator, Iterator, Sequence

import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.entries import as_int64
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.model.session import Session
from memorizing_transformers_pytorch.model.state import XLMemories

Prompt = Tensor | Sequence[Sequence[int]]


def generate(
    model: MemorizingTransformer,
    prompt: Prompt,
    memories: Sequence[KNNMemory] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Collection[int] | None = None,
    generator: torch.Generator | None = None,
    segment_length: int = 512,
    xl_memories: XLMemories | None = None,
) -> list[list[int]]:
    """Continue each row of the prompt; return the new tokens of each row, with the stop token if one came.

    prompt: (B, N) token ids, or a sequence of B sequences of any lengths, each at least 1; of any length, far beyond
        segment_length too: what leaves the local context enters the memories.
    memories: one per memorizing layer, with B rows in scope, empty or not; None for local attention only. Afterwards
        they hold what was read and written, as far as their capacity goes (with XL memory: what that has discarded;
        with a token that ends a document: what came after it).
    temperature: of sampling (at least 0); 0 takes the likeliest token. top_k: sample from the k likeliest tokens only.
    top_p: sample from the fewest tokens that together have this probability (Holtzman et al. 2020).
    stop: token id or ids after which a row ends. generator: makes sampling repeatable.
    segment_length: local context; take that of training. Logits equal teacher forcing through segments of this length
        from the beginning of the prompt (see `session`).
    xl_memories: state to go on from, as a call of the model or `Session.close` returned it.

    Raises ValueError, before anything is read, for an empty prompt, token ids outside the vocabulary, memories that do
    not fit, or sampling parameters out of range.
    """
    steps = stream(
        model,
        prompt,
        memories,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        generator=generator,
        segment_length=segment_length,
        xl_memories=xl_memories,
    )
    written: list[list[int]] = [[] for _ in prompt]
    for tokens in steps:
        for row, token in zip(written, tokens, strict=True):
            if token is not None:
                row.append(token)
    return written


def stream(
    model: MemorizingTransformer,
    prompt: Prompt,
    memories: Sequence[KNNMemory] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Collection[int] | None = None,
    generator: torch.Generator | None = None,
    segment_length: int = 512,
    xl_memories: XLMemories | None = None,
) -> Generator[list[int | None]]:
    """`generate`, token by token: yields the new token of each row, None for rows that have ended.

    Checks at once, reads when first asked for a token. When the iterator has ended or was closed (close it before the
    memories), the memories hold what was read and written.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    rows = _rows_of(prompt)
    session = Session(model, memories, batch_size=len(rows), segment_length=segment_length, xl_memories=xl_memories)
    session.checked(rows)
    stops = {stop} if isinstance(stop, int) else set(stop or ())

    def write() -> Generator[list[int | None]]:
        pending = rows
        ended = [False] * len(rows)
        try:
            for _ in range(max_new_tokens):
                chosen = sample(session.read(pending), temperature, top_k, top_p, generator).tolist()
                pending = [[] if end else [token] for token, end in zip(chosen, ended, strict=True)]
                yield [None if end else token for token, end in zip(chosen, ended, strict=True)]
                ended = [end or token in stops for token, end in zip(chosen, ended, strict=True)]
                if all(ended):
                    break
        except GeneratorExit:  # closed early: what was yielded is still to be remembered
            if not any(memory.is_closed for memory in session.memories or ()):
                session.read(pending)
                session.close()
            raise
        session.read(pending)
        session.close()

    return write()


def _rows_of(prompt: Prompt) -> list[list[int]]:
    """The prompt as lists, if it is a batch of at least one text, each of at least one token."""
    rows = as_int64(prompt, "the prompt").tolist() if isinstance(prompt, Tensor) else list(prompt)
    if not all(isinstance(row, Sequence | Tensor) for row in rows):
        raise ValueError(f"expected a prompt (rows, tokens), got {str(prompt)[:100]}")
    lengths = [len(row) for row in rows]
    if not rows or min(lengths) == 0:
        raise ValueError(f"expected a prompt of at least 1 row and 1 token each, got {lengths} tokens")
    try:
        return [[operator.index(token) for token in row] for row in rows]
    except TypeError:
        raise ValueError(f"expected integer tokens in the prompt, got {str(prompt)[:100]}") from None


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for numbers out of range."""
    if max_new_tokens < 0:
        raise ValueError(f"expected max_new_tokens to be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"expected temperature to be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"expected top_k to be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"expected top_p above 0 and at most 1, got {top_p}")


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """logits (B, V) -> one token of each row (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(dim=-1)), 0)
    device = probabilities.device if generator is None else generator.device
    return torch.multinomial(probabilities.to(device), 1, generator=generator).squeeze(-1).to(logits.device)


def until(stop: str | None, texts: Iterator[str]) -> Iterator[str]:
    """The texts up to where `stop` begins. An end that may be the beginning of `stop` is held back."""
    if not stop:
        yield from texts
        return
    held = ""
    for text in texts:
        held += text
        if stop in held:
            yield held[: held.index(stop)]
            return
        begun = next((n for n in range(min(len(stop) - 1, len(held)), 0, -1) if stop.startswith(held[-n:])), 0)
        yield held[: len(held) - begun]
        held = held[len(held) - begun :]
    yield held
