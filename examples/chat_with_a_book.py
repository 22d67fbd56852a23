"""Ask a model about a book that is far longer than its context.

    python examples/chat_with_a_book.py HuggingFaceTB/SmolLM2-135M-Instruct book.txt

The book is read once into a memory; questions and answers that leave the window of the chat enter it too.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer
from tyro.conf import Positional

from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory


class Chat:
    """A conversation with a model that has a memory. It goes on with its cache from turn to turn."""

    def __init__(self, memory: AttachedMemory, tokenizer: Any, max_new_tokens: int = 60) -> None:
        self.memory, self.tokenizer, self.max_new_tokens = memory, tokenizer, max_new_tokens
        self.tokens, self.cache = None, None

    def ask(self, question: str) -> str:
        """The answer of the model."""
        prompt = f"Question: {question}\nAnswer:"
        new = self.tokenizer(prompt if self.tokens is None else f"\n{prompt}", return_tensors="pt").input_ids
        tokens = new if self.tokens is None else self.tokens.new_tensor([self.tokens[0].tolist() + new[0].tolist()])
        done = self.memory.model.generate(
            tokens,
            past_key_values=self.cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        self.tokens, self.cache = done.sequences, done.past_key_values
        return str(self.tokenizer.decode(done.sequences[0, tokens.shape[1] :], skip_special_tokens=True)).strip()

    def sources(self, book: list[int], count: int = 3, around: int = 15) -> list[str]:
        """The passages of the book that the last token of the answer looked at most."""
        places = Counter(
            place // (2 * around)
            for found in self.memory.last_retrieved.values()
            for number, place in found[..., :2].reshape(-1, 2).tolist()
            if number == 0
        )
        starts = [block * 2 * around for block, _ in places.most_common(count)]
        return [self.tokenizer.decode(book[start : start + 2 * around]) for start in starts]


def main(model: Positional[str], book: Positional[Path], window: int = 1024) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    memory = attach_memory(
        AutoModelForCausalLM.from_pretrained(model), retrieve="tokens", write="window", window=window
    )
    tokens = tokenizer(book.read_text(), return_tensors="pt").input_ids
    memory.read(tokens, document=book.name)
    chat = Chat(memory, tokenizer)
    while question := input("? "):
        print(chat.ask(question), *chat.sources(tokens[0].tolist()), sep="\n  > ")


if __name__ == "__main__":
    tyro.cli(main)
