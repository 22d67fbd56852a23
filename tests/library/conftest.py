"""A tiny model of each kind, in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing_transformers_pytorch.data.tokenizer import ByteTokenizer
from memorizing_transformers_pytorch.model.checkpoint import save_checkpoint
from memorizing_transformers_pytorch.model.config import ModelConfig
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.training.config import RunConfig, TrainingConfig
from memorizing_transformers_pytorch.training.run import CONFIG, TOKENIZER
from memorizing_transformers_pytorch.training.settings import write_yaml
from memorizing_transformers_pytorch.utils.durable import write_checksums

SIZES = {"num_tokens": 256, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "max_knn_memories": 5_000}


def make_run(folder: Path, seed: int = 0, segment_length: int = 32, **changes: Any) -> Path:
    torch.manual_seed(seed)
    model = ModelConfig(**{**SIZES, "short_conv": 2, "xl_max_memories": 5, **changes})
    checkpoint = folder / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    state = {"processes": 1, "progress": {"step": 1}, "best": None, "text": ""}
    (checkpoint / "state.json").write_text(json.dumps(state))
    save_checkpoint(MemorizingTransformer.from_config(model), checkpoint / "model.safetensors")
    write_checksums(checkpoint)
    ByteTokenizer().save(folder / TOKENIZER)
    write_yaml(RunConfig(model=model, training=TrainingConfig(segment_length=segment_length)), folder / CONFIG)
    return folder


def make_hub_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.huggingface.families import tiny

    model = tiny(family, **changes)
    model.resize_token_embeddings(256)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(params=["run", "hub"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of a run, or of a model of transformers whose first head finds passages."""
    folder = tmp_path / "model"
    attach_spans = pytest.importorskip("memorizing_transformers_pytorch.huggingface.attach_spans")
    monkeypatch.setattr(attach_spans, "best_head", lambda *_: attach_spans.Head(0, 0, 1.0))
    return str(make_run(folder, segment_length=128) if request.param == "run" else make_hub_model(folder))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with three texts, the last of several portions, and what is none."""
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "one.txt").write_text("It was the best of times. " * 8)
    (folder / "below" / "two.txt").write_text("Où est la mémoire ? " * 5)
    (folder / "zlong.txt").write_text("".join(f"line {n} of a long text\n" for n in range(260)))
    (folder / "picture").write_bytes(b"\x89PNG\0\0")
    (folder / "nothing.txt").write_text(" \n")
    return folder
