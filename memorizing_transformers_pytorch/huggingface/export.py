"""A training run as a folder that transformers loads: weights, configuration, tokenizer and model card."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memorizing_transformers_pytorch.data.tokenizer import ByteTokenizer, Tokenizer
from memorizing_transformers_pytorch.huggingface.causal_lm import (
    MemorizingTransformerConfig,
    MemorizingTransformerForCausalLM,
)
from memorizing_transformers_pytorch.training.run import LoadedRun, load_run, run_named

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [memorizing-transformer, memorizing_transformers_pytorch]
---

# {name}

A Memorizing Transformer ([Wu et al. 2022](https://arxiv.org/abs/2203.08913)): {parameters:,} parameters, {depth} layers
of width {dim}, of which {memorizing} also attend to the {topk} best of the last {capacity:,} keys and values.
It reads a text of any length in segments of {segment_length} tokens.

Trained for {step:,} steps on `{source}` (memorizing_transformers_pytorch, `train`).

```python
import memorizing_transformers_pytorch.huggingface  # makes the architecture known
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("A text of any length", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


def export_run(run: Path, folder: Path, checkpoint: str = "last") -> MemorizingTransformerForCausalLM:
    """Write a run as a new folder for `AutoModelForCausalLM.from_pretrained` and `huggingface_hub`.

    checkpoint: "last" or "best". Raises ValueError for a folder that exists, or where there is no such run.
    """
    if folder.exists():
        raise ValueError(f"expected a new folder, got {str(folder)!r}, which exists")
    loaded = load_run(run_named(run), checkpoint)
    model = converted(loaded)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(aside)
        for_transformers(loaded.tokenizer).save_pretrained(aside)
        (aside / "README.md").write_text(_card(loaded, folder.name), encoding="utf-8")
        aside.chmod(0o755)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return model


def converted(run: LoadedRun) -> MemorizingTransformerForCausalLM:
    """The model of a run, as one of transformers, sharing its weights."""
    fields, segment_length = run.model.config.to_dict(), run.config.training.segment_length
    config = MemorizingTransformerConfig({**fields, "knn_memories_directory": None}, segment_length)
    model = MemorizingTransformerForCausalLM(config)
    model.model.load_state_dict(run.model.state_dict())
    return model.to(run.model.token_emb.weight.dtype).eval()  # type: ignore[no-any-return, arg-type]


def for_transformers(tokenizer: Tokenizer) -> Any:
    """The same tokens as one of transformers."""
    if isinstance(tokenizer, ByteTokenizer):
        # The library writes bytes as letters, in an order of its own.
        vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
        bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.decoder = decoders.ByteLevel()
    else:
        bpe = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=bpe, clean_up_tokenization_spaces=False)


def _letters() -> list[str]:
    """The letter with which GPT-2's byte-level tokenizers write each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _card(run: LoadedRun, name: str) -> str:
    config = run.model.config
    return CARD.format(
        name=name,
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        depth=config.depth,
        dim=config.dim,
        memorizing=len(config.layers_with_memory),
        topk=config.num_retrieved_memories,
        capacity=config.max_knn_memories,
        segment_length=run.config.training.segment_length,
        step=run.step,
        source=run.config.data.source,
    )
