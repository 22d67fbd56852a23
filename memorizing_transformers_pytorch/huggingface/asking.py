"""Asking a model that has a memory of passages: answers with their sources, at once or piece by piece, and chats.

Shapes: N tokens of a prompt or question, P of a passage.
"""

from __future__ import annotations

import contextvars
import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer

from memorizing_transformers_pytorch.huggingface.models import evaluating
from memorizing_transformers_pytorch.huggingface.prompts import (
    ANSWER_FROM_TEXT,
    QUESTION,
    Asked,
    Excerpt,
    Placed,
    Turn,
    prompt_of,
)
from memorizing_transformers_pytorch.huggingface.texts import tokens_of
from memorizing_transformers_pytorch.model.generation import until

MAX_NEW_TOKENS = 256
THREAD = "writing an answer"
LAST_TOKENS = 20  # hold the words that end an answer


@dataclass(frozen=True)
class Answer:
    """What the model has written, and the passages that it was given with the question, the best first. asked: the
    whole prompt, and more for `explain`."""

    text: str
    sources: list[Excerpt]
    asked: Asked | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return "\n".join((self.text, *(f"[{i}] {source}" for i, source in enumerate(self.sources, 1))))


class AnswerStream:
    """An answer that is being written: iterate over its pieces. `text` and `sources` wait until it is complete.

    A generation that fails raises here. `close` stops it: the answer is what was written until then.
    """

    def __init__(self, write: Callable[..., Answer], tokenizer: Any, stop: str | None) -> None:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stopped, self.done = threading.Event(), Future[Answer]()
        self._pieces: Iterator[str] = until(stop, filter(None, streamer))
        work = (_into, self.done, write, streamer, self._stopped)  # nothing in it holds this object
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=work, name=THREAD)
        weakref.finalize(self, self._stopped.set)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            self._thread.join()
            self.done.result()  # raises what the generation has raised
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop writing, after the token that is being written."""
        self._stopped.set()
        self._thread.join()

    @property
    def answer(self) -> Answer:
        """The whole answer."""
        self._thread.join()
        return self.done.result()

    @property
    def text(self) -> str:
        return self.answer.text

    @property
    def sources(self) -> list[Excerpt]:
        return self.answer.sources

    def __str__(self) -> str:
        return str(self.answer)


def _into(done: Future[Answer], write: Callable[..., Answer], streamer: Any, stopped: threading.Event) -> None:
    try:
        done.set_result(write(streamer, stopped))
    except BaseException as error:
        done.set_exception(error)
    finally:
        streamer.text_queue.put(streamer.stop_signal)


class Given(NamedTuple):
    """The passages for a message, the best first. in_prompt: those to put into its prompt. before: if passages go into
    the cache before the prompt instead, a function that returns them once the model has written."""

    in_prompt: list[Excerpt]
    before: Callable[[], list[Excerpt]] | None


Finding = Callable[[Tensor, int], AbstractContextManager[Given]]
"""Finds passages of a row by a question (N,), for calls of the model inside."""


class Chat:
    """A conversation with a model that has a memory, from `RecallMemory.chat`. Each message finds its own passages,
    with which it begins; they stay in the conversation. (If the memory has a window, they stand before all of it.)

    messages: what was said, without passages. asks: whether each message is a question about what was read; the prompt
    then asks the model to answer from the text in a few words. The KV cache is kept from turn to turn.
    """

    def __init__(
        self, model: Any, tokenizer: Any, finding: Finding, system: str | None, row: int, *, asks: bool
    ) -> None:
        if tokenizer is None:
            raise ValueError("to ask, the memory needs a tokenizer: attach_memory(model, tokenizer=tokenizer)")
        self._model, self._tokenizer, self._finding, self._row = model, tokenizer, finding, row
        self._stop = None if getattr(tokenizer, "chat_template", None) else f"\n{QUESTION}"
        self._asks = asks and self._stop is None
        self._turns = [] if system is None else [Turn("system", system)]
        self._tokens, self._cache = torch.zeros(1, 0, dtype=torch.int64), None
        self._last: Future[Answer] | None = None  # not the stream itself: one that nobody holds ends

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": turn.role, "content": turn.content} for turn in self._turns]

    @overload
    def say(
        self,
        text: str,
        *,
        stream: Literal[False] = False,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> Answer: ...

    @overload
    def say(
        self,
        text: str,
        *,
        stream: Literal[True],
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> AnswerStream: ...

    def say(
        self,
        text: str,
        *,
        stream: bool = False,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> Answer | AnswerStream:
        """The answer to the next message; see `RecallMemory.ask`. After an error the message counts as not said."""
        if self._last is not None and not self._last.done():
            raise ValueError("the answer before is still being written: iterate to its end, or close() it")
        question = tokens_of(text, self._tokenizer, self._model)
        config = _config(self._model, generation_config, max_new_tokens)

        def write(streamer: Any, stopped: threading.Event) -> Answer:
            with self._finding(question, self._row) as given, evaluating(self._model):
                turns, prompt, placed = self._with(text, given)
                written, tokens = self._write(prompt[None], config, streamer, stopped)
                sources = given.in_prompt if given.before is None else given.before()
            self._turns = [*turns, Turn("assistant", written)]
            return Answer(written, sources, Asked(self._row, prompt, question, placed, tokens))

        if not stream:
            return write(None, threading.Event())
        written = AnswerStream(write, self._tokenizer, self._stop)
        self._last = written.done
        return written

    def asked(self, text: str) -> Asked:
        """What the model would be given with the next message."""
        question = tokens_of(text, self._tokenizer, self._model)
        with self._finding(question, self._row) as given:
            _, prompt, placed = self._with(text, given)
        return Asked(self._row, prompt, question, placed, prompt[:0])

    def _with(self, text: str, given: Given) -> tuple[list[Turn], Tensor, list[Placed] | None]:
        """All that was said and the next message -> its prompt (N,), and the passages in it."""
        content = f"{QUESTION} {text}\n{ANSWER_FROM_TEXT}" if self._asks else text
        turns = [*self._turns, Turn("user", content, given.in_prompt)]
        prompt, placed = prompt_of(turns, self._tokenizer)
        return turns, prompt, placed if given.before is None else None

    def _write(
        self, prompt: Tensor, config: GenerationConfig, streamer: Any, stopped: threading.Event
    ) -> tuple[str, Tensor]:
        """Let the model write on -> the text, and its tokens (M,)."""
        cache, count = self._cache_for(prompt), prompt.shape[1]
        self._tokens, self._cache = self._tokens[:, :0], None  # until all went well

        def is_over(tokens: Tensor, _scores: Any, **_: Any) -> Tensor:
            last = self._tokenizer.decode(tokens[0, max(count, tokens.shape[1] - LAST_TOKENS) :])
            over = stopped.is_set() or (self._stop is not None and self._stop in last)
            return torch.full((len(tokens),), over, device=tokens.device)

        prompt = prompt.to(self._model.device)
        out = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            generation_config=config,
            streamer=streamer,
            stopping_criteria=[is_over],
        )
        if config.num_beams in (None, 1):
            self._tokens, self._cache = out.sequences[:1].cpu(), out.past_key_values
        tokens = out.sequences[0, count:].cpu()
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        text = (text if self._stop is None else text.partition(self._stop)[0]).strip()
        while len(tokens) and text in self._tokenizer.decode(tokens[:-1], skip_special_tokens=True):
            tokens = tokens[:-1]  # what ends an answer is no part of it
        return text, tokens

    def _cache_for(self, prompt: Tensor) -> Any:
        """The cache, cut to what it has in common with the prompt; None to begin anew. (A template may write a message
        differently later, and so may a tokenizer.)"""
        if self._cache is None:
            return None
        length = self._cache.get_seq_length()
        most = min(length, prompt.shape[1] - 1)
        same = int((self._tokens[0, :most] == prompt[0, :most]).cumprod(dim=0).sum())
        try:
            if same < length:
                self._cache.crop(same - length)
        except (RuntimeError, ValueError):  # layers with a window have forgotten what came before
            return None
        return self._cache if same else None


def _config(model: Any, given: GenerationConfig | None, max_new_tokens: int | None) -> GenerationConfig:
    """Greedy unless given."""
    config = copy.deepcopy(model.generation_config if given is None else given)
    if given is None:
        config.do_sample, config.num_beams = False, 1
        config.temperature = config.top_p = config.top_k = None
    if max_new_tokens is not None or config.max_new_tokens is None:
        config.max_new_tokens = max_new_tokens or MAX_NEW_TOKENS
    ends = config.eos_token_id or model.generation_config.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    config.return_dict_in_generate = True
    return config
