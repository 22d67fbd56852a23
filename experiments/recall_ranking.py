"""How often the passage with the answer is found first, and among the first two and four: by a head, by words, by both.

    python experiments/recall_ranking.py MODEL_FOLDER OUTPUT.json --text moby-dick.txt

Asked are forty questions about the first 60,000 tokens of Moby Dick, written from memory of the book (a passage counts
if it holds a word of the answer, so some count by chance); and, planted in it, twenty facts in other words and twenty
pass keys, and the same sentences begun again after other text. Nothing is answered: this is about finding alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from huggingface_perplexity import load
from recall_facts import LOCAL, QUESTIONS, Asking, planted, with_sentences

from memorizing_transformers_pytorch.evaluation.provenance import origin, provenance
from memorizing_transformers_pytorch.huggingface import attach_memory
from memorizing_transformers_pytorch.huggingface.recall import QUERY

ABOUT_THE_BOOK = {
    "Which inn does Peter Coffin keep?": "Spouter",
    "Who is the landlord of the Spouter Inn?": "Peter Coffin",
    "What is Queequeg selling in the streets on a Sunday?": "heads",
    "Who preaches in the Whaleman's Chapel?": "Mapple",
    "What does Queequeg smoke his tobacco from?": "tomahawk",
    "In which town does the narrator arrive on a Saturday night in December?": "New Bedford",
    "What did the boy try to crawl up, so that his stepmother sent him to bed?": "chimney",
    "What is the name of Queequeg's little idol?": "Yojo",
    "How does Father Mapple climb into his pulpit?": "ladder",
    "From which island does Queequeg come?": "Rokovoko|Kokovoko",
    "On which ship do Ishmael and Queequeg sign on?": "Pequod",
    "Who is the other owner of the ship besides Captain Peleg?": "Bildad",
    "What is the name of the inn of Mrs. Hussey?": "Try Pots",
    "What dish is served at the Try Pots?": "[Cc]howder",
    "What was the prophet called who warned them about Ahab?": "Elijah",
    "Who is the chief mate of the Pequod?": "Starbuck",
    "Who is the second mate?": "Stubb",
    "Where does Flask, the third mate, come from?": "Tisbury",
    "Which harpooneer is a negro?": "Daggoo",
    "Which harpooneer is an Indian from Gay Head?": "Tashtego",
    "What share, or lay, is Ishmael offered?": "seven hundred and seventy-seventh|three hundredth",
    "What did Queequeg draw as his signature?": "cross|mark|queer round figure|figure",
    "What is Ahab's leg made of?": "ivory|bone|jaw",
    "Which prophet was swallowed by a whale in the sermon?": "Jonah",
    "To which city did Jonah want to flee?": "Tarshish",
    "How much did the passage cost Jonah?": "thrice the usual|fare",
    "Who was the charity woman that brought ginger-jub aboard?": "Aunt Charity|Charity",
    "What kind of books did Bildad read?": "Bible|Scripture",
    "What did Queequeg use his harpoon for when shaving?": "harpoon",
    "Who jumped into the sea to save the young man who had fallen overboard?": "Queequeg",
    "What is the name of the schooner that takes them to Nantucket?": "Moss",
    "What is the religion of Bildad and Peleg?": "Quaker",
    "What fast did Queequeg keep in his room?": "Ramadan",
    "What was hung over the counter of the bar, shaped like part of a whale?": "jaw",
    "Who was Bulkington?": "helm|Southern|mountaineer",
    "What is the smallest class of whales called, in the Duodecimo?": "[Pp]orpoise",
    "What is the colour of the scar on Ahab's face?": "whitish|white",
    "Which whale took off Ahab's leg?": "parmacetty|Moby|monstrousest",
    "What do sailors pay, while passengers must pay too?": "pay",
    "Why does the narrator go to sea instead of pistol and ball?": "pistol and ball",
}
FIRST = (1, 2, 4)


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    text: Path
    tokens: int = 60_000
    threads: int = 1


def asked(asking: Asking) -> dict[str, list[tuple[str | list[int], str]]]:
    """By kind: questions, as text or as tokens, and what the passage must hold."""
    facts = [each for each in planted() if each.kind == "fact"]
    keys = [each for each in planted() if each.kind != "fact"]
    return {
        "about the book": list(ABOUT_THE_BOOK.items()),
        "facts, in other words": [(QUESTIONS[each.question], re.escape(each.answer)) for each in facts],
        "pass keys": [(each.question, re.escape(each.answer)) for each in keys],
        "facts, begun again": [(asking.begun_again(each)[-QUERY:], re.escape(each.answer)) for each in facts],
        "pass keys, begun again": [(asking.begun_again(each)[-QUERY:], re.escape(each.answer)) for each in keys],
    }


def ranks(memory: Any, questions: list[tuple[str | list[int], str]]) -> list[int | None]:
    """Which passage is the first to hold the answer, from 0 on; None if none of four does."""
    found: list[int | None] = []
    for question, answer in questions:
        given = question if isinstance(question, str) else torch.tensor(question)
        texts = [" ".join(each.text.split()) for each in memory.recall(given, passages=max(FIRST))]
        found.append(next((i for i, text in enumerate(texts) if re.search(answer, text)), None))
    return found


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model)
    whole = tokenizer(options.text.read_text()).input_ids
    text = torch.tensor(with_sentences(whole[: options.tokens], planted(), tokenizer))
    asking = Asking(model, tokenizer, whole[options.tokens : options.tokens + LOCAL])
    results: dict[str, Any] = {"tokens": len(text), "ranks": {}}
    for finders in (["bm25"], ["both", "head"]):
        memory: Any = attach_memory(model, tokenizer=tokenizer, finder=finders[0], max_memories=len(text))
        memory.read(text, progress=False)
        for finder in finders:
            if finder == "head":
                memory._at_work.recall.search._words = None  # the text is read once for both
            for kind, questions in asked(asking).items():
                results["ranks"][f"{finder} | {kind}"] = found = ranks(memory, questions)
                counts = [sum(rank is not None and rank < first for rank in found) for first in FIRST]
                print(f"{finder}, {kind}: {counts} of {len(found)}", flush=True)
        memory.detach()
    results |= provenance(torch.device("cpu"))
    options.output.write_text(json.dumps(results, indent=1))
    print(f"({origin(results)}; {len(text):,} tokens of {options.text.name})")


if __name__ == "__main__":
    main(tyro.cli(Options))
