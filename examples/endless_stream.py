"""Follow a text without end: how surprising each part is, given all that the memory still holds.

    tail -f server.log | python examples/endless_stream.py HuggingFaceTB/SmolLM2-135M

The memory keeps the last `--remembered` tokens; time and space for each part do not grow any more once it is full.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer
from tyro.conf import Positional

from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory


def portions(lines: Iterable[str], tokenizer: Any, size: int) -> Iterator[list[int]]:
    """So many tokens at a time."""
    waiting: list[int] = []
    for line in lines:
        waiting += tokenizer(line).input_ids
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting) > 1:
        yield waiting


def follow(
    memory: AttachedMemory, tokenizer: Any, lines: Iterable[str], size: int = 256
) -> Iterator[tuple[int, float]]:
    """Read as the lines come -> tokens so far, and the loss per token of the last portion in nats."""
    read = 0
    for portion in portions(lines, tokenizer, size):
        tokens = tokenizer.pad({"input_ids": [portion]}, return_tensors="pt").input_ids
        (losses,) = memory.score(tokens, document=f"tokens from {read}", progress=False)
        read += len(portion)
        yield read, float(losses[1:].mean())


def main(model: Positional[str], remembered: int = 65_536) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    memory = attach_memory(AutoModelForCausalLM.from_pretrained(model), retrieve="tokens", max_memories=remembered)
    for read, loss in follow(memory, tokenizer, sys.stdin):
        print(f"{read:>10,} tokens  {loss:.3f} nats per token", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
