"""What a model of transformers answers about a long text that it has read into a memory of passages, nothing trained.

    python experiments/recall_facts.py MODEL_FOLDER OUTPUT.json --text moby-dick.txt --tokens 60000

Twenty facts that cannot be guessed and twenty numbered pass keys are planted in real prose, evenly from its beginning
to its end. Each is asked for in two ways: its sentence is begun again after 60 tokens of other text, and (facts only)
it is asked for in other words, through the chat template. Counted is how often the greedy answer holds the fact: with
passages that the memory finds (by the model's head, or by the head and by words), before the prompt or in it, with the
passages of BM25 in the prompt (RAG), with the right passage in the prompt, with the whole text as context where the
model takes it, and with nothing. `memory.ask`, in other words, has passages in the prompt; `generate`, begun again,
before it. Budgets are equal: as many passages, as long.
Also counted is how often the passage with the answer came first. What OUTPUT.json has already is not measured again.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from huggingface_facts import FACTS, Planted, with_sentences
from huggingface_perplexity import load
from transformers.cache_utils import DynamicCache

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.huggingface import attach_memory
from memorizing_transformers_pytorch.huggingface.prompts import ANSWER_FROM_TEXT
from memorizing_transformers_pytorch.huggingface.recall import QUERY

QUESTIONS = {
    "The favourite dish of Queen Ottoline was": "What did Queen Ottoline like to eat best?",
    "The architect of the Vesper Bridge was": "Who designed the Vesper Bridge?",
    "The dog of the lighthouse keeper was called": "What was the name of the lighthouse keeper's dog?",
    "The treaty of Marrow Hill was signed in the year": "When was the treaty of Marrow Hill signed?",
    "The colour of the banner of the Quillfeather family was": "What colour was the Quillfeather banner?",
    "The cure for the sleeping fever was found in": "Where did people find a cure for the sleeping fever?",
    "The captain of the airship Melusine came from": "Which country was the captain of the airship Melusine from?",
    "The password of the smugglers of Penhallow was": "What password did the smugglers of Penhallow use?",
    "The instrument that Doctor Abernethy played was the": "Which instrument did Doctor Abernethy play?",
    "The prize of the great race of Calloway was a": "What could one win in the great race of Calloway?",
    "The oldest tree in the park of Ravensmoor was a": "What kind of tree is the oldest in Ravensmoor park?",
    "The number of the house of Madame Perrault was": "At which house number did Madame Perrault live?",
    "The horse that won the Dunmore cup was named": "Which horse won the Dunmore cup?",
    "The material of the mask of King Aldous was": "What was King Aldous's mask made of?",
    "The sister of the clockmaker of Velden was called": "What was the name of the sister of Velden's clockmaker?",
    "The island on which the Petrel was wrecked was": "On which island did the Petrel run aground?",
    "The only thing that the giant Ombo feared was": "What was the giant Ombo afraid of?",
    "The trade of the father of Lady Ashgrove was that of a": "What did Lady Ashgrove's father do for a living?",
    "The flower on the coat of arms of Tregarth was a": "Which flower does Tregarth's coat of arms show?",
    "The day on which the bells of Sarn were cast was a": "On which day of the week were the bells of Sarn cast?",
}
NUMBERS = [str(number) for number in np.random.default_rng(0).integers(10_000, 99_999, 20).tolist()]
LOCAL = 60
SPAN = 80


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    text: Path
    tokens: int = 6_000
    passages: tuple[int, ...] = (1, 2, 4)
    content: tuple[str, ...] = ("kv", "tokens")
    finder: tuple[str, ...] = ("head", "both")
    kept: str = "bfloat16"
    """The dtype of the memory."""
    device: str = "cpu"
    dtype: str = "float32"


def planted() -> list[Planted]:
    """Facts and pass keys, in turn, from the beginning to the end."""
    facts = [("fact", question, answer) for question, answer in FACTS.items()]
    keys = [("pass key", f"The pass key of door {i + 1} is", number) for i, number in enumerate(NUMBERS)]
    order = [each for pair in zip(facts, keys, strict=True) for each in pair]
    depths = np.linspace(0.01, 0.99, len(order)).tolist()
    return [Planted(*each, depth) for each, depth in zip(order, depths, strict=True)]


def asked(each: Planted) -> str:
    """As `memory.ask` asks."""
    return f"Question: {QUESTIONS[each.question]}\n{ANSWER_FROM_TEXT}"


class Asking:
    """A model that is asked, and how the answers are counted."""

    def __init__(self, model: Any, tokenizer: Any, before: list[int]) -> None:
        self.model, self.tokenizer, self.before = model, tokenizer, before

    def begun_again(self, each: Planted) -> list[int]:
        return self.before + self.tokens(f"\n{each.question}")

    def in_words(self, each: Planted, passages: str = "") -> list[int]:
        content = f"Text:\n{passages}\n\n{asked(each)}" if passages else asked(each)
        return self.tokens(self.template(content))

    @property
    def chats(self) -> bool:
        return self.tokenizer.chat_template is not None

    def template(self, content: str) -> str:
        turns = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def holds(self, each: Planted, ids: list[int], most: int, **options: Any) -> bool:
        """Whether what is written after these tokens holds the answer."""
        tokens = torch.tensor([ids], device=self.model.device)
        mask = torch.ones_like(tokens)
        written = self.model.generate(tokens, attention_mask=mask, max_new_tokens=most, do_sample=False, **options)
        return each.answer.lower() in self.tokenizer.decode(written[0, len(ids) :]).lower()


def ways(asking: Asking, memory: Any) -> dict[str, Callable[[Planted], bool]]:
    """How the memory is asked: by the sentence begun again, with passages before it in the cache, and in other words;
    and whether it finds the place."""

    def again(each: Planted) -> bool:
        return asking.holds(each, asking.begun_again(each), 8)

    def words(each: Planted) -> bool:
        count = memory.options.passages
        answer = memory.ask(QUESTIONS[each.question], max_new_tokens=24, passages=count)
        return each.answer.lower() in answer.text.lower()

    def first(question: list[int], each: Planted) -> bool:
        (best,) = memory.recall(torch.tensor(question), passages=1)
        return each.answer in best.text

    return {
        "again": again,
        "words": words,
        "again, found first": lambda each: first(asking.begun_again(each)[-QUERY:], each),
        "words, found first": lambda each: first(asking.tokens(QUESTIONS[each.question]), each),
    }


def before_the_prompt(asking: Asking, memory: Any) -> dict[str, Callable[[Planted], bool]]:
    """Asked in other words, with passages before the prompt, in the cache."""

    def words(each: Planted) -> bool:
        with memory.finding_by(QUESTIONS[each.question], 0):
            return asking.holds(each, asking.in_words(each), 24)

    return {"words": words}


def in_prompt(asking: Asking, passages: Callable[[Planted, str], str]) -> dict[str, Callable[[Planted], bool]]:
    """Passages in the prompt, as text: those for a fact, which is asked for by a question."""

    def again(each: Planted) -> bool:
        return asking.holds(each, asking.tokens(passages(each, each.question)) + asking.begun_again(each), 8)

    def words(each: Planted) -> bool:
        return asking.holds(each, asking.in_words(each, passages(each, QUESTIONS[each.question])), 24)

    return {"again": again, "words": words}


def recalled(memory: Any, count: int) -> Callable[[Planted, str], str]:
    """Those that a memory finds, the best last."""
    return lambda _, question: "\n...\n".join(each.text for each in reversed(memory.recall(question, passages=count)))


def right(asking: Asking, text: list[int]) -> Callable[[Planted, str], str]:
    """The one with the fact in its middle."""

    def passage(each: Planted, _: str) -> str:
        sentence = asking.tokens(each.sentence)
        place = next(i for i in range(len(text)) if text[i : i + len(sentence)] == sentence) + len(sentence) // 2
        return asking.tokenizer.decode(text[max(place - SPAN // 2, 0) : place + SPAN // 2])

    return passage


def with_all(asking: Asking, text: list[int]) -> dict[str, Callable[[Planted], bool]]:
    """The whole text as context, which goes through the model once for each way of asking."""
    mark = "TEXT"
    head, _ = asking.template(f"Text:\n{mark}").split(mark)
    known = {"again": text, "words": asking.tokens(head) + text}
    caches: dict[str, Any] = {}

    def holds(kind: str, each: Planted, question: list[int], most: int) -> bool:
        if kind not in caches:
            caches[kind] = DynamicCache()
            with torch.no_grad():
                tokens = torch.tensor([known[kind]], device=asking.model.device)
                asking.model(tokens, past_key_values=caches[kind], logits_to_keep=1)
        return asking.holds(each, known[kind] + question, most, past_key_values=copy.deepcopy(caches[kind]))

    def words(each: Planted) -> bool:
        _, tail = asking.template(f"Text:\n{mark}\n\n{asked(each)}").split(mark)
        return holds("words", each, asking.tokens(tail), 24)

    return {"again": lambda each: holds("again", each, asking.begun_again(each), 8), "words": words}


class Results:
    """What was measured, in a file."""

    def __init__(self, path: Path, options: Options, *, chats: bool) -> None:
        self._chats = chats  # whether the model can be asked in other words
        self.path, self.found = path, json.loads(path.read_text()) if path.is_file() else {}
        self.found.setdefault("answers", {})
        self._options = options

    def measure(self, way: str, asks: dict[str, Callable[[Planted], bool]], sentences: list[Planted]) -> None:
        """How many of the facts and of the pass keys are found this way."""
        for kind, ask in asks.items():
            for what in ("fact", "pass key"):
                name = f"{way} | {what} | {kind}"
                if name in self.found["answers"] or (what == "pass key" and kind.startswith("words")):
                    continue
                if kind == "words" and not self._chats:
                    continue
                start = time.monotonic()
                some = [each for each in sentences if each.kind == what]
                self.found["answers"][name] = [bool(ask(each)) for each in some]
                self.save()
                right = sum(self.found["answers"][name])
                print(
                    f"{name}: {right} of {len(some)}, {(time.monotonic() - start) / len(some):.1f} s each", flush=True
                )

    def save(self) -> None:
        self.found.update(provenance(torch.device(self._options.device)))
        self.path.write_text(json.dumps(self.found, indent=1))


def measure_memory(options: Options, content: str, text: list[int], asking: Asking, results: Results) -> None:
    """A memory whose passages are found by the model's own head, or also by their words."""
    memory = attach_memory(
        asking.model,
        retrieve="spans",
        tokenizer=asking.tokenizer,
        content=content,
        finder="both",
        dtype=getattr(torch, options.kept),
        max_memories=len(text),
    )
    start = time.monotonic()
    memory.read(torch.tensor(text), document=options.text.name)
    results.found[f"reading, {content}"] = {
        "seconds": time.monotonic() - start,
        "bytes a token": memory.num_bytes / len(text),
    }
    results.save()
    print(memory, results.found[f"reading, {content}"], flush=True)
    search: Any = memory._at_work.recall.search
    words = search._words
    for finder, count in itertools.product(options.finder, options.passages):
        search._words = None if finder == "head" else words  # the text is read once for both
        object.__setattr__(memory.options, "passages", count)
        name = f"{content}, {finder}, {count} passages"
        asks = ways(asking, memory)
        if count != options.passages[0]:
            asks = {kind: ask for kind, ask in asks.items() if "found" not in kind}
        results.measure(f"memory, {name}", asks, planted())
        results.measure(f"before the prompt, {name}", before_the_prompt(asking, memory), planted())
        with memory.enabled(False):
            asks = in_prompt(asking, recalled(memory, count))
            results.measure(f"in the prompt, {name}", {"again": asks["again"]}, planted())
    memory.detach()


def main(options: Options) -> None:
    model, tokenizer = load(options.model, options.device, options.dtype)
    whole = tokenizer(options.text.read_text()).input_ids
    sentences = planted()
    text = with_sentences(whole[: options.tokens], sentences, tokenizer)
    asking = Asking(model, tokenizer, whole[options.tokens : options.tokens + LOCAL])
    results = Results(options.output, options, chats=asking.chats)
    results.found["tokens"] = len(text)
    nothing = {"again": lambda each: asking.holds(each, asking.begun_again(each), 8)}
    results.measure("nothing", nothing, sentences)
    words = attach_memory(
        model, retrieve="spans", tokenizer=tokenizer, content="tokens", finder="bm25", max_memories=len(text)
    )
    words.read(torch.tensor(text), progress=False)
    for count in options.passages:
        with words.enabled(False):
            results.measure(
                f"BM25 in the prompt, {count} passages", in_prompt(asking, recalled(words, count)), sentences
            )
    with words.enabled(False):
        results.measure("the right passage in the prompt", in_prompt(asking, right(asking, text)), sentences)
    first = {name: ask for name, ask in ways(asking, words).items() if "first" in name}
    results.measure("BM25", first, sentences)
    words.detach()
    for content in options.content:
        measure_memory(options, content, text, asking, results)
    if len(text) + 2 * LOCAL < model.config.max_position_embeddings:
        results.measure("full context", with_all(asking, text), sentences)
    print(table(results.found["answers"]))
    print(f"({origin(results.found)}; {len(text):,} tokens of {options.text.name})")


def table(answers: dict[str, list[bool]]) -> str:
    """How many were right, by way."""
    columns = [("fact", "again"), ("fact", "words"), ("pass key", "again")]
    columns += [("fact", "again, found first"), ("fact", "words, found first"), ("pass key", "again, found first")]
    lines = ["| | " + " | ".join(f"{what}: {kind}" for what, kind in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for way in dict.fromkeys(name.split(" | ")[0] for name in answers):
        found = [answers.get(f"{way} | {what} | {kind}") for what, kind in columns]
        lines.append(
            f"| {way} | " + " | ".join("-" if each is None else f"{sum(each)} of {len(each)}" for each in found) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
