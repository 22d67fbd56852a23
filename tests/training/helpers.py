"""Runs that take a second: tiny models, tiny texts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.model.config import ModelConfig
from memorizing_transformers_pytorch.training.config import MemoryConfig, OptimizerConfig, RunConfig, TrainingConfig
from memorizing_transformers_pytorch.training.metrics import read_metrics
from memorizing_transformers_pytorch.training.run import METRICS
from memorizing_transformers_pytorch.training.settings import write_yaml
from memorizing_transformers_pytorch.training.trainer import Trainer

Changes = dict[str, Any]

MODEL: Changes = {
    "num_tokens": 256,
    "dim": 16,
    "depth": 2,
    "dim_head": 8,
    "heads": 2,
    "ff_mult": 2,
    "memorizing_layers": 2,
    "max_knn_memories": 21,
    "num_retrieved_memories": 3,
    "pad_id": None,
}


def write_corpus(folder: Path, documents: int = 24) -> Path:
    """Text files of 3 to 118 bytes."""
    folder.mkdir(parents=True)
    for number in range(documents):
        words = " ".join(f"w{(number * 7 + i * i) % 13}" for i in range(30))
        (folder / f"{number}.txt").write_text(words[: 3 + 5 * number], encoding="utf-8")
    return folder


def make_config(
    folder: Path = Path("nowhere"),
    model: Changes | None = None,
    data: Changes | None = None,
    optimizer: Changes | None = None,
    memory: Changes | None = None,
    training: Changes | None = None,
    **others: Any,
) -> RunConfig:
    """A run over the corpus in `folder / "corpus"`, with these changes."""
    text: Changes = {
        "source": str(folder / "corpus"),
        "tokenizer": "bytes",
        "valid": 0.2,
        "test": 0.0,
        "near_duplicates": None,
        "cache": folder / "cache",
    }
    loop: Changes = {"steps": 12, "rows": 4, "segment_length": 8, "validate_every": 1000, "checkpoint_every": 1000}
    return RunConfig(
        device="cpu",
        model=ModelConfig(**MODEL | (model or {})),
        data=DataConfig(**text | (data or {})),
        optimizer=OptimizerConfig(**{"learning_rate": 0.02, "warmup_steps": 3} | (optimizer or {})),
        memory=MemoryConfig(**memory or {}),
        training=TrainingConfig(**loop | (training or {})),
        **others,
    )


def documents(*lengths: int, num_tokens: int = 256) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(num_tokens, size=length).astype(np.uint16) for length in lengths]


LENGTHS = (41, 5, 2, 17, 33, 9, 60, 8, 16, 25)


def make_trainer(config: RunConfig, *lengths: int) -> Trainer:
    """Of random documents of these lengths, in this process alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=config.training.precision)
    return Trainer(config, documents(*(lengths or LENGTHS)), accelerator)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def losses_of(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every line that the run has written, in its order."""
    return [(record["step"], record["loss"]) for record in read_metrics(run / METRICS) if "loss" in record]


def command(config: RunConfig, run: Path, *flags: str) -> list[str]:
    """The arguments of `train` for this run; the configuration goes by a file."""
    path = run.with_suffix(".yaml")
    write_yaml(config, path)
    given = () if "--resume" in flags else ("--config", str(path))
    return ["train", *given, "--output", str(run), "--no-evaluate", "--sample-tokens", "0", *flags]


def start(
    arguments: list[str],
    launcher: tuple[str, ...] = (),
    module: str = "memorizing_transformers_pytorch",
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    """`python LAUNCHER -m MODULE ARGUMENTS` on its own, without a GPU, with one thread."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", module, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )
