"""Tune a model to use its memory with `Trainer`: LoRA on the queries of the memory layers, and the biases.

    python examples/tune_with_trainer.py HuggingFaceTB/SmolLM2-135M tuned --texts a.txt b.txt --steps 300

What is saved is only what was learned. To use it: attach_memory(model), then PeftModel.from_pretrained(model, "tuned").
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from tyro.conf import Positional

from memorizing_transformers_pytorch.data.stream import DocumentStream
from memorizing_transformers_pytorch.huggingface import attach_memory


class Segments(IterableDataset):
    """Batches in which each row goes through a document segment by segment, then through the next."""

    def __init__(self, documents: list[list[int]], rows: int, segment: int) -> None:
        self.documents, self.rows, self.segment = [np.array(each) for each in documents], rows, segment

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in DocumentStream(self.documents, rows=self.rows, segment_length=self.segment):
            labels = batch.tokens.masked_fill(~batch.mask, -100)
            starts = batch.starts.any(dim=1).nonzero().flatten().tolist()
            yield {"input_ids": batch.tokens, "attention_mask": batch.mask, "labels": labels, "starts": starts}


class MemoryTrainer(Trainer):
    """Remembers each segment after its backward pass, and begins anew with each document."""

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        starts = inputs.pop("starts")
        if self.memory.documents():
            self.memory.clear(starts)
        with self.memory.writing():
            return super().training_step(model, inputs, *more)


def tune(model: Any, documents: list[list[int]], output: Path, steps: int, rows: int = 1, segment: int = 512) -> Any:
    """Tune the model, save what was learned and return the adapted model."""
    memory = attach_memory(model, retrieve="tokens")
    lora = LoraConfig(
        target_modules=["q_proj"], layers_to_transform=list(memory.layers), modules_to_save=["memory_bias"]
    )
    adapted = get_peft_model(model, lora)
    own = {"per_device_train_batch_size": 1, "remove_unused_columns": False, "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(output, max_steps=steps, learning_rate=1e-3, **own)
    data = Segments(documents, rows, segment)
    trainer = MemoryTrainer(adapted, arguments, train_dataset=data, data_collator=lambda items: items[0])
    trainer.memory = memory
    trainer.train()
    trainer.save_model()
    return adapted


def main(model: Positional[str], output: Positional[Path], texts: tuple[Path, ...], steps: int = 300) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = [tokenizer(path.read_text()).input_ids for path in texts]
    tune(AutoModelForCausalLM.from_pretrained(model), documents, output, steps)


if __name__ == "__main__":
    tyro.cli(main)
