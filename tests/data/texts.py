"""Texts made for tests."""

from __future__ import annotations

import random


def prose(seed: int, num_words: int) -> str:
    """Words that another seed does not have in this order."""
    chosen = random.Random(seed)
    return " ".join(f"w{chosen.randrange(5000)}" for _ in range(num_words))


def near_copy(text: str, number: int) -> str:
    """The text with one word in a hundred or so changed."""
    words = text.split()
    for place in range(number, len(words), 150):
        words[place] = f"changed{number}"
    return " ".join(words)
