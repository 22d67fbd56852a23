"""train.py, the enwik8 run of the original, with a narrower model and a text of our own instead of enwik8."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from memorizing_transformers_pytorch import MemorizingTransformer, ModelConfig
from memorizing_transformers_pytorch.checkpoint import load_checkpoint

CONFIG = ModelConfig.preset("enwik8", dim=16, dim_head=8, heads=2, max_knn_memories=40)
SPLIT = {name: np.full(400, number, dtype=np.uint8) for number, name in enumerate(("train", "valid", "test"), start=1)}


def options(tmp_path: Path, **changes: Any) -> train.Options:
    sizes = {"steps": 3, "batch_size": 2, "segments": 3, "segment_length": 8, "validate_every": 2, "device": "cpu"}
    return train.Options(enwik8=tmp_path, output=tmp_path / "model.safetensors", **{**sizes, **changes})


def test_it_has_the_shapes_and_hyper_parameters_of_the_original() -> None:
    config, used = ModelConfig.preset("enwik8"), train.Options(enwik8=Path("enwik8"))
    assert (config.num_tokens, config.dim, config.depth, config.heads, config.dim_head) == (256, 512, 8, 8, 64)
    assert (config.layers_with_memory, config.max_knn_memories, config.num_retrieved_memories) == ((4,), 7680, 32)
    assert (config.layers_with_xl, config.xl_max_memories, config.num_kv_heads) == ((7, 8), 512, 1)
    assert (used.batch_size, used.segments, used.segment_length) == (16, 5, 512)
    assert (used.learning_rate, used.max_grad_norm, used.validate_every) == (2e-4, 0.5, 100)


def test_it_validates_on_validation_data_and_trains_on_training_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault B10 of the original. Each byte of the text tells which split it belongs to."""
    seen: list[tuple[bool, int]] = []
    forward = MemorizingTransformer.forward

    def watched(self: MemorizingTransformer, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.extend({(self.training, byte) for byte in x.flatten().tolist()})
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(train, "read_enwik8", lambda path: SPLIT)
    monkeypatch.setattr(MemorizingTransformer, "forward", watched)
    train.main(options(tmp_path), CONFIG)
    assert set(seen) == {(True, 1), (False, 2)}
    printed = capsys.readouterr().out
    assert printed.count("validation loss") == 2
    assert load_checkpoint(tmp_path / "model.safetensors").config == CONFIG
    with pytest.raises(ValueError, match="expected a new file for the checkpoint"):
        train.main(options(tmp_path), CONFIG)


def test_every_step_begins_with_empty_memories_and_fills_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[tuple[int, ...]] = []
    forward = MemorizingTransformer.forward

    def watched(self: MemorizingTransformer, x: torch.Tensor, memories: Any, *args: Any, **kwargs: Any) -> Any:
        entries.append(memories[0].num_entries)
        return forward(self, x, memories, *args, **kwargs)

    monkeypatch.setattr(MemorizingTransformer, "forward", watched)
    model = MemorizingTransformer.from_config(CONFIG)
    tokens = train.random_places(SPLIT["train"], options(tmp_path), np.random.default_rng(0))
    for _ in range(2):
        train.read_segments(model, tokens, options(tmp_path))
    assert entries == [(0, 0), (8, 8), (16, 16)] * 2


def test_gradients_are_those_of_the_mean_over_segments(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MemorizingTransformer.from_config(CONFIG)
    tokens = torch.randint(0, 256, (2, 25))
    loss = train.read_segments(model, tokens, options(tmp_path))
    accumulated = model.token_emb.weight.grad
    assert accumulated is not None
    model.zero_grad()
    total, state = torch.zeros(()), None
    memories = model.create_knn_memories(batch_size=2)
    for start in (0, 8, 16):
        part, state = model(tokens[:, start : start + 8], memories, state, labels=tokens[:, start + 1 : start + 9])
        total = total + part / 3
    total.backward()
    assert loss == pytest.approx(total.item())
    torch.testing.assert_close(accumulated, model.token_emb.weight.grad)


def test_a_path_without_enwik8_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    script = Path(train.__file__)
    result = subprocess.run(
        [sys.executable, script, "nowhere"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "train.py: expected enwik8 or enwik8.zip, got 'nowhere', which does not exist"
    ]
