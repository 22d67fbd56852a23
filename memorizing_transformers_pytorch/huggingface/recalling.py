"""A memory of passages, attached to a causal language model of transformers.

Shapes: N tokens of a question, P of a passage.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

from torch import Tensor
from transformers import GenerationConfig

from memorizing_transformers_pytorch.huggingface.asking import Answer, AnswerStream, Chat, Given
from memorizing_transformers_pytorch.huggingface.attached import AttachedMemory
from memorizing_transformers_pytorch.huggingface.contents import Titles
from memorizing_transformers_pytorch.huggingface.models import check_ids, vocabulary_of
from memorizing_transformers_pytorch.huggingface.prompts import Asked, Excerpt
from memorizing_transformers_pytorch.huggingface.recall import Recall
from memorizing_transformers_pytorch.huggingface.searching import Query, Recalled
from memorizing_transformers_pytorch.huggingface.texts import tokens_of
from memorizing_transformers_pytorch.memory.entries import POSITION

ASKED = 4  # passages in the prompt of a question, unless told otherwise


class RecallMemory(AttachedMemory):
    """The memory of a model, from `attach_memory(retrieve="spans")`: passages that stand before what it is given."""

    def __repr__(self) -> str:
        if not self._at_work.is_attached:
            return "RecallMemory(detached)"
        entries = list(next(iter(self.layers.values())).num_entries)
        options = f"content={self.options.content!r}, finder={self.options.finder!r}"
        return f"RecallMemory({options}, tokens={entries}, bytes={self.num_bytes:,})"

    @contextlib.contextmanager
    def writing(self, document: Titles = None) -> Iterator[None]:
        """Raises ValueError: passages are not trained. Use `read`, or a memory with retrieve="tokens"."""
        raise ValueError("passages are not trained: use read() instead of writing(), or retrieve='tokens'")
        yield

    @property
    def finder(self) -> Any:
        """Which head finds passages: its layer, its number, and its induction score; None where words alone do."""
        finder = self._recall.search.finder
        return None if finder is None else finder.head

    @property
    def _recall(self) -> Recall:
        recall = self._at_work.recall
        assert recall is not None
        return recall

    def recall(self, question: str | Tensor, *, passages: int | None = None, row: int = 0) -> list[Excerpt]:
        """The passages of a row that fit a question best, the best first.

        question: text, if the memory has a tokenizer, or token ids (N,). passages: how many; as the memory places
        before a prompt unless given.
        Raises ValueError for an empty question, and a row that does not exist.
        """
        self._expect_row(row)
        query = Query(row, tokens_of(question, self.tokenizer, self.model))
        count = self.options.passages if passages is None else passages
        return self._passages(self._recall.search.best(query, count))

    @overload
    def ask(
        self,
        question: str,
        *,
        stream: Literal[False] = False,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        system: str | None = None,
        passages: int = ASKED,
        row: int = 0,
    ) -> Answer: ...

    @overload
    def ask(
        self,
        question: str,
        *,
        stream: Literal[True],
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        system: str | None = None,
        passages: int = ASKED,
        row: int = 0,
    ) -> AnswerStream: ...

    def ask(
        self,
        question: str,
        *,
        stream: bool = False,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        system: str | None = None,
        passages: int = ASKED,
        row: int = 0,
    ) -> Answer | AnswerStream:
        """What the model answers to a question, with the passages of a row that fit it in the prompt.

        Passages are found by the question alone. The prompt is made by the chat template of the tokenizer, with the
        passages, the question, and the request to answer from the text in a few words; or else it is "Text: ...
        Question: ... Answer:". (Say it in your own words with `chat().say`.) `answer.asked.prompt` is what the model
        was given. Of a memory with a window, passages stand before the prompt, in the cache.

        stream: give the answer while it is being written, as an iterator over pieces of its text.
        max_new_tokens: 256 unless given, or given by generation_config. generation_config: greedy unless given.
        system: a message that comes before the question. passages: how many (with a window, as many as the memory
        places before every text).

        Raises ValueError for an empty question, a row that does not exist, and a memory without a tokenizer.
        """
        chat: Any = self._chat(system, row, passages, asks=True)
        answer: Answer | AnswerStream = chat.say(
            question, stream=stream, max_new_tokens=max_new_tokens, generation_config=generation_config
        )
        return answer

    def asked(self, question: str, *, passages: int = ASKED, row: int = 0) -> Asked:
        """What `ask` gives to the model: the prompt, and where passages lie in it. Raises what `ask` raises."""
        return self._chat(None, row, passages, asks=True).asked(question)

    def chat(self, *, system: str | None = None, passages: int = ASKED, row: int = 0) -> Chat:
        """A conversation, in which `say` gives the answer to each message, with so many passages that fit it."""
        return self._chat(system, row, passages, asks=False)

    def _chat(self, system: str | None, row: int, passages: int, *, asks: bool) -> Chat:
        self._expect_row(row)
        if passages < 1:
            raise ValueError(f"passages must be at least 1, got {passages}")
        finding = functools.partial(self._finding, passages=passages)
        return Chat(self.model, self.tokenizer, finding, system, row, asks=asks)

    @contextlib.contextmanager
    def _finding(self, question: Tensor, row: int, passages: int) -> Iterator[Given]:
        """Passages are given in the prompt. With a window, what leaves it is stored, and should hold no passages: there
        they stand before the prompt, in the cache."""
        if self.options.write == "window":
            with self.finding_by(question, row) as standing:
                yield Given([], lambda: sorted((e for e in standing() if e.score > 0), key=lambda e: -e.score))
            return
        found = self.recall(question, passages=passages, row=row) if self._at_work.enabled.now else []
        with self.enabled(False):
            yield Given(found, None)

    @contextlib.contextmanager
    def finding_by(self, question: str | Tensor, row: int) -> Iterator[Callable[[], list[Excerpt]]]:
        """Inside, calls of the model find passages of a row by a question, text or (N,) -> those of the last call, in
        the order in which they stand before the text, and among them the first tokens of a document."""
        self._expect_row(row)
        tokens = tokens_of(question, self.tokenizer, self.model) if isinstance(question, str) else question
        noted = list[Recalled]()
        with self.watched_row(row), self._recall.asked.at([Query(row, tokens)]), self._at_work.noted.at(noted):
            yield lambda: [each for recalled in noted[:1] for each in self._passages(_runs(recalled))]

    def _expect_row(self, row: int) -> None:
        self._at_work.expect_attached()
        if not 0 <= row < self.num_rows:
            raise ValueError(f"the memory has rows 0 to {self.num_rows - 1}, got {row}")

    @property
    def last_retrieved(self) -> dict[int, Tensor]:
        """Raises ValueError: layers retrieve nothing. See `last_recalled`."""
        raise ValueError("a memory of passages retrieves no single tokens: last_recalled tells its passages")

    @property
    def last_recalled(self) -> list[list[Excerpt]]:
        """For each row of the last call of the model that chose passages: which ones, in the order in which they stand
        before the text."""
        return [self._passages(_runs(each)) for each in self._at_work.last_recalled]

    def _passages(self, found: list[tuple[Tensor, float]]) -> list[Excerpt]:
        made = []
        for origins, score in found:
            number, tokens = int(origins[0, 0]), origins[:, 2].clone()
            known = self.ledger[number] if number in self.ledger else None  # noqa: SIM401 (a ledger is no dictionary)
            check_ids(tokens, vocabulary_of(self.model), "the memory")  # mapped files are not read when they are loaded
            text = None if self.tokenizer is None else self.tokenizer.decode(tokens)
            position = int(self.ledger.in_documents(origins)[0, POSITION])
            made.append(Excerpt(number, "" if known is None else known.title, position, text, score, tokens))
        return made


def _runs(recalled: Recalled) -> list[tuple[Tensor, float]]:
    """Origins (P, 3) of what was recalled, one for each passage that hangs together, and its score."""
    origins = recalled.origins
    if len(origins) == 0:
        return []
    breaks = (origins[1:, :2] - origins[:-1, :2] != origins.new_tensor([0, 1])).any(dim=1).nonzero()[:, 0] + 1
    runs, start = [], 0
    for stop in [*breaks.tolist(), len(origins)]:
        scores = [hit.score for hit in recalled.hits if start <= hit.place < stop]
        runs.append((origins[start:stop], max(scores, default=0.0)))
        start = stop
    return runs
