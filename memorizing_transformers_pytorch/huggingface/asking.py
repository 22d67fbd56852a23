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
from typing import Any, Literal, overload

import torch
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer

from memorizing_transformers_pytorch.huggingface.models import evaluating
from memorizing_transformers_pytorch.huggingface.texts import document_tokens, tokens_of
from memorizing_transformers_pytorch.model.generation import until

MAX_NEW_TOKENS = 256
QUESTION, ANSWER = "Question:", "Answer:"
ANSWER_FROM_TEXT = "Answer from the text, in a few words."  # SmolLM2-135M answers twice as many questions with it
FIRST_WORDS = 10
THREAD = "writing an answer"


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


@dataclass(frozen=True, eq=False)
class Asked:
    """The row of the memory, and token ids (N,): the prompt, the question by which passages were found, and what was
    written."""

    row: int
    prompt: Tensor
    question: Tensor
    written: Tensor


@dataclass(frozen=True)
class Answer:
    """What the model has written, and the passages that stood before the question, the best first. asked: for
    `explain`."""

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


Asking = Callable[[Tensor, int], AbstractContextManager[Callable[[], list[Excerpt]]]]
"""Inside, calls of the model find passages of a row by a question (N,) -> which ones they have found."""


class Chat:
    """A conversation with a model that has a memory, from `RecallMemory.chat`. Each message finds its own passages.

    messages: what was said, as chat templates take it. asks: whether each message is a question about what was read;
    the prompt then asks the model to answer from the text in a few words. The KV cache is kept from turn to turn.
    """

    def __init__(self, model: Any, tokenizer: Any, asking: Asking, system: str | None, row: int, *, asks: bool) -> None:
        if tokenizer is None:
            raise ValueError("to ask, the memory needs a tokenizer: attach_memory(model, tokenizer=tokenizer)")
        self._model, self._tokenizer, self._asking, self._row = model, tokenizer, asking, row
        self._stop = None if getattr(tokenizer, "chat_template", None) else f"\n{QUESTION}"
        self._asks = asks and self._stop is None
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._tokens, self._cache = torch.zeros(1, 0, dtype=torch.int64), None
        self._last: Future[Answer] | None = None  # not the stream itself: one that nobody holds ends

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
        messages = self._with(text)
        question, prompt = tokens_of(text, self._tokenizer, self._model), self._prompt(messages)
        config = _config(self._model, generation_config, max_new_tokens)

        def write(streamer: Any, stopped: threading.Event) -> Answer:
            with self._asking(question, self._row) as found, evaluating(self._model):
                written, tokens = self._write(prompt, config, streamer, stopped)
                answer = Answer(written, found(), Asked(self._row, prompt[0], question, tokens))
            self.messages = [*messages, {"role": "assistant", "content": written}]
            return answer

        if not stream:
            return write(None, threading.Event())
        written = AnswerStream(write, self._tokenizer, self._stop)
        self._last = written.done
        return written

    def prompt_of(self, text: str) -> Tensor:
        """(N,): what the model is given to answer the next message."""
        return self._prompt(self._with(text))[0]

    def _with(self, text: str) -> list[dict[str, str]]:
        content = f"{QUESTION} {text}\n{ANSWER_FROM_TEXT}" if self._asks else text
        return [*self.messages, {"role": "user", "content": content}]

    def _prompt(self, messages: list[dict[str, str]]) -> Tensor:
        """Messages as token ids (1, N)."""
        if self._stop is None:
            made = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            return torch.tensor(made["input_ids"], dtype=torch.int64).reshape(1, -1)
        begins = {"user": f"{QUESTION} ", "assistant": f"{ANSWER} ", "system": ""}
        text = "\n".join(begins[each["role"]] + each["content"] for each in messages)
        return document_tokens(f"{text}\n{ANSWER}", self._tokenizer)[None]

    def _write(
        self, prompt: Tensor, config: GenerationConfig, streamer: Any, stopped: threading.Event
    ) -> tuple[str, Tensor]:
        """Let the model write on -> the text, and its tokens (M,)."""
        cache, count = self._cache_for(prompt), prompt.shape[1]
        self._tokens, self._cache = self._tokens[:, :0], None  # until all went well

        def is_over(tokens: Tensor, _scores: Any, **_: Any) -> Tensor:
            last = self._tokenizer.decode(tokens[0, max(count, tokens.shape[1] - 2 * FIRST_WORDS) :])
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
