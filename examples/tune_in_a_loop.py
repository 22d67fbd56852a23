"""Tune a frozen model to use its memory in a plain loop: a number for each head of each memory layer, nothing else.

    python examples/tune_in_a_loop.py HuggingFaceTB/SmolLM2-135M biases.safetensors --texts a.txt b.txt

To use the result: attach_memory(model).load_parameters("biases.safetensors").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from tyro.conf import Positional

from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory


def tune(model: Any, documents: list[Tensor], segment: int = 512, rate: float = 0.05, **options: Any) -> AttachedMemory:
    """Read documents (1, N) in order, segment by segment, learning how much to trust the memory."""
    memory = attach_memory(model.requires_grad_(False), retrieve="tokens", **options)
    optimizer = torch.optim.AdamW(memory.parameters(), lr=rate, weight_decay=0.0)
    for document in documents:
        memory.clear()
        for part in document.split(segment, dim=1):
            if part.shape[1] < 2:
                continue
            with memory.writing():  # remembered at the end, after the backward pass
                loss = model(input_ids=part, labels=part).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"{loss.item():.3f}", end=" ", flush=True)
    memory.clear()
    return memory


def main(model: Positional[str], output: Positional[Path], texts: tuple[Path, ...]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = [tokenizer(path.read_text(), return_tensors="pt").input_ids for path in texts]
    tune(AutoModelForCausalLM.from_pretrained(model), documents).save_parameters(output)


if __name__ == "__main__":
    tyro.cli(main)
