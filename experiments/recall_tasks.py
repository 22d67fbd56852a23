"""The field's own tests of finding: a pass key at every depth, values of keys, variables.

    python experiments/recall_tasks.py MODEL_FOLDER OUTPUT.json --text moby-dick.txt --task "pass key" --tokens 300000

pass key: one key (InfiniteBench, after Mohtashami and Jaggi, 2023) at each of 20 depths of a text. The text is read
    as 20 documents; at each depth the one that lies there is read with the key in its middle, asked about, and
    forgotten. (Other keys are never remembered at the same time.)
values: a list of pairs of random uuids; the value of one of them is asked for (InfiniteBench's key-value retrieval),
    and after the passages the model writes on with `"KEY": "`.
variables: a value that is handed on from one of five variables to the next, all over the text; the names of all five
    are asked for (RULER's variable tracking). Counted is the share of names, for `questions` texts.

Passages found by the model's head, by words (BM25, at equal budget), and by both stand in the prompt (a text is read
once for all three); beside them the right passage, and everything in the prompt, where the model takes it. What
OUTPUT.json has already is not measured again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from huggingface_perplexity import load

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.huggingface import attach_memory

Finder = Literal["head", "bm25", "both"]
Score = tuple[float, bool | None]
DEPTHS = 20
KEY = "\nThe pass key is {0}. Remember it. {0} is the pass key.\n"
WORDS = {"pass key": 16, "values": 40, "variables": 48}  # tokens of an answer


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    text: Path
    task: Literal["pass key", "values", "variables"]
    tokens: int = 6_000
    passages: tuple[int, ...] = (1,)
    span: int = 80
    questions: int = 20
    finder: tuple[Finder, ...] = ("head", "bm25", "both")
    threads: int = 1


@dataclass(frozen=True)
class Case:
    """A text that is read, or a change of it, and what is asked about it. right: the part that holds the answer. begun:
    how the answer begins, where the model writes on after passages as text, instead of answering through `ask`."""

    document: str
    text: str
    question: str
    answers: Sequence[str]
    right: str | None
    begun: str = ""


def pass_keys(parts: Sequence[str]) -> Iterator[Case]:
    random = np.random.default_rng(0)
    for i, part in enumerate(parts):
        number = str(random.integers(10_000, 99_999))
        middle = len(part) // 2
        sentence = KEY.format(number)
        text = part[:middle] + sentence + part[middle:]
        right = text[middle - 120 : middle + len(sentence) + 120]
        yield Case(f"part {i} with the key", text, "Which number is the pass key?", [number], right)


def values(count: int, questions: int) -> tuple[str, list[Case]]:
    """A list of so many pairs, and some of its values."""
    random = np.random.default_rng(0)
    ids = [str(uuid.UUID(bytes=random.bytes(16), version=4)) for _ in range(2 * count)]
    pairs = list(zip(ids[::2], ids[1::2], strict=True))
    lines = [f'"{key}": "{value}"' for key, value in pairs]
    chosen = np.linspace(0, count - 1, questions).astype(int).tolist()
    cases = [
        Case("", "", f'What is the value of "{key}"?', [value], lines[i], f'"{key}": "')
        for i in chosen
        for key, value in [pairs[i]]
    ]
    return "{" + ",\n ".join(lines) + "}", cases


def variables(parts: Sequence[str]) -> Iterator[Case]:
    """Each part of a text by itself, with a chain of assignments all over it."""
    random = np.random.default_rng(0)
    for i, part in enumerate(parts):
        names = ["".join(random.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 5)) for _ in range(5)]
        value = str(random.integers(10_000, 99_999))
        given = [value, *(f"VAR {name}" for name in names)]
        sentences = [f"\nVAR {name} = {of}\n" for name, of in zip(names, given, strict=False)]
        places = [int(len(part) * depth) for depth in (0.1, 0.3, 0.5, 0.7, 0.9)]
        pieces = [part[a:b] for a, b in itertools.pairwise([0, *places, len(part)])]
        text = "".join(map("".join, zip(pieces, [*sentences, ""], strict=True)))
        question = f"Which variables are assigned the value {value}, directly or through other variables?"
        yield Case(f"text {i}", text, question, names, "".join(sentences))


class Trial:
    """A model that is asked, and what was measured, in a file."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model, self.tokenizer = load(options.model)
        self.found = json.loads(options.output.read_text()) if options.output.is_file() else {}

    def parts(self, count: int, tokens: int) -> list[str]:
        """A text in equal parts."""
        ids = self.tokenizer(self.options.text.read_text()).input_ids[: count * tokens]
        return [self.tokenizer.decode(ids[i * tokens : (i + 1) * tokens]) for i in range(count)]

    def memory(self, finder: str = "both") -> Any:
        return attach_memory(
            self.model,
            retrieve="spans",
            tokenizer=self.tokenizer,
            finder=finder,
            span=self.options.span,
            dtype=torch.bfloat16,
            max_memories=2 * self.options.tokens + 100_000,
        )

    def ways(self) -> Iterator[tuple[str, Finder, int]]:
        for finder, count in itertools.product(self.options.finder, self.options.passages):
            yield f"{self.options.task} | {finder}, {count} passages", finder, count

    def asked(self, memory: Any, case: Case, count: int = 1) -> Score:
        """The share of the answers that are given, and whether a passage holds one."""
        if case.begun:
            passages = memory.recall(case.question, passages=count)
            said = self.written_on(memory, "\n".join(each.text for each in reversed(passages)) + "\n" + case.begun)
        else:
            answer = memory.ask(case.question, max_new_tokens=WORDS[self.options.task], passages=count)
            said, passages = answer.text.lower(), answer.sources
        seen = "\n".join(each.text.lower() for each in passages)
        given = [each.lower() in said for each in case.answers]
        return sum(given) / len(given), any(each.lower() in seen for each in case.answers)

    def written_on(self, memory: Any, text: str) -> str:
        """What the model writes after this text, and nothing before it."""
        tokens, most = self.tokenizer(text, return_tensors="pt").input_ids, WORDS[self.options.task]
        with memory.enabled(False):
            written = self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=most, do_sample=False
            )
        return str(self.tokenizer.decode(written[0, tokens.shape[1] :]).lower())

    def compare(
        self, cases: Sequence[Case], reading: Callable[[Any, Case], contextlib.AbstractContextManager[Any]]
    ) -> None:
        """The answers by each way of finding that is not known. reading: while it lasts, the memory holds a case."""
        ways = [way for way in self.ways() if way[0] not in self.found]
        if not ways:
            return
        memory, scores = self.memory(), {name: list[Score]() for name, *_ in ways}
        for case in cases:
            with reading(memory, case):
                for name, finder, count in ways:
                    with only(memory, finder):
                        scores[name].append(self.asked(memory, case, count))
        memory.detach()
        for name, own in scores.items():
            self.note(name, own)

    def note(self, name: str, scores: Sequence[Score]) -> None:
        self.found[name] = {"scores": [each[0] for each in scores], "found": [each[1] for each in scores]}
        self.found |= provenance(torch.device("cpu"))
        self.options.output.write_text(json.dumps(self.found, indent=1))
        print(shown(name, self.found[name]), flush=True)

    def with_text(self, name: str, cases: Sequence[tuple[Case, str]]) -> None:
        """The answers with a text of each in the prompt, as `memory.ask` puts it there."""
        name = f"{self.options.task} | {name}"
        if name in self.found:
            return
        memory, scores = self.memory("bm25"), list[Score]()
        for case, text in cases:
            (row,) = self.tokenizer([text], add_special_tokens=False).input_ids
            object.__setattr__(memory.options, "span", len(row))
            memory.clear()
            memory.read(torch.tensor(row), progress=False)
            scores.append((self.asked(memory, case)[0], None))
        memory.detach()
        self.note(name, scores)


@contextlib.contextmanager
def only(memory: Any, finder: Finder) -> Iterator[None]:
    """Inside, a memory that was read for the head and for words finds by one of them."""
    search = memory._at_work.recall.search
    head, words = search.finder, search._words
    search.finder, search._words = None if finder == "bm25" else head, None if finder == "head" else words
    try:
        yield
    finally:
        search.finder, search._words = head, words


def pass_key(trial: Trial) -> None:
    parts = trial.parts(DEPTHS, trial.options.tokens // DEPTHS)
    cases = list(pass_keys(parts))
    trial.with_text("the right passage", [(case, str(case.right)) for case in cases])

    @contextlib.contextmanager
    def reading(memory: Any, case: Case) -> Iterator[None]:
        if not len(memory.documents()):
            for i, part in enumerate(parts):
                memory.read(part, document=f"part {i}", progress=False)
            print(memory, flush=True)
        memory.read(case.text, document=case.document, progress=False)
        yield
        memory.forget(case.document)

    trial.compare(cases, reading)


def of_one_text(trial: Trial, text: str, cases: list[Case]) -> None:
    trial.with_text("the right passage", [(case, str(case.right)) for case in cases])
    if len(trial.tokenizer(text).input_ids) < trial.model.config.max_position_embeddings - 200:
        trial.with_text("everything in the prompt", [(case, text) for case in cases])

    @contextlib.contextmanager
    def reading(memory: Any, case: Case) -> Iterator[None]:
        if not len(memory.documents()):
            memory.read(text, progress=False)
        yield

    trial.compare(cases, reading)


def of_many_texts(trial: Trial, cases: list[Case]) -> None:
    trial.with_text("the right passages", [(case, str(case.right)) for case in cases])
    if trial.options.tokens < trial.model.config.max_position_embeddings - 400:
        trial.with_text("everything in the prompt", [(case, case.text) for case in cases])

    @contextlib.contextmanager
    def reading(memory: Any, case: Case) -> Iterator[None]:
        memory.clear()
        memory.read(case.text, progress=False)
        yield

    trial.compare(cases, reading)


def shown(name: str, of: dict[str, list[Any]]) -> str:
    seen = [each for each in of["found"] if each is not None]
    found = f"found {sum(seen)} of {len(seen)}" if seen else "-"
    return f"| {name} | {sum(of['scores']):.1f} of {len(of['scores'])} | {found} |"


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    trial = Trial(options)
    if options.task == "pass key":
        pass_key(trial)
    elif options.task == "values":
        pair = len(trial.tokenizer(values(1, 1)[0]).input_ids)
        of_one_text(trial, *values(options.tokens // pair, options.questions))
    else:
        of_many_texts(trial, list(variables(trial.parts(options.questions, options.tokens))))
    print("| task, way | answers | an answer in a passage |\n|---|---|---|")
    print("\n".join(shown(name, of) for name, of in trial.found.items() if isinstance(of, dict) and "scores" in of))
    print(f"({origin(trial.found)}; {options.tokens:,} tokens)")


if __name__ == "__main__":
    main(tyro.cli(Options))
