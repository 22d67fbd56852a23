"""The configuration of a training run: frozen, keyword-only, checked. The field names are the flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from memorizing_transformers_pytorch.data.config import DataConfig
from memorizing_transformers_pytorch.model.config import ModelConfig


def _check_at_least(least: float, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"expected {name} to be at least {least}, got {value}")


def _check_share(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"expected {name} from 0 to 1, got {getattr(config, name)}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser and its learning rate."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), or Adafactor (Shazeer & Stern 2018), which scales steps by the weights and caps
    the learning rate at 1 / sqrt(step)."""
    learning_rate: float = 4e-3
    """Peak of the learning rate, after warm-up."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "rsqrt", "constant"] = "cosine"
    """After warm-up: a cosine; the reciprocal square root of the step (the paper's); or constant."""
    decay_share: float = 0.0
    """In this last share of the steps the learning rate falls linearly instead, from where it is then."""
    final_share: float = 0.1
    """Where cosine and linear decay end, as a share of the peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW: decay of the mean of their squares."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights, and validate, evaluate and write with it; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} to be above 0, got {getattr(self, name)}")
        _check_at_least(0, self, "warmup_steps", "weight_decay")
        _check_share(self, "decay_share", "final_share")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"expected {name} from 0 to below 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """When the memory is read in training, and how much of it. (What it is, the model says.)"""

    last_share: float = 1.0
    """Read and write memories in this last share of the steps; train on the local context alone before. A young model
    has no use for a memory, and it slows learning (docs/training.md)."""
    from_step: int | None = None
    """The step from which memories are read and written, instead of last_share."""
    from_loss: float | None = None
    """Also wait until the running mean of the loss (nats per token) has fallen below this."""
    growth: tuple[tuple[int, int], ...] = ()
    """Pairs of a step and the entries that a row keeps from that step on, at most model.max_knn_memories, such as 0 512
    1000 8192. A smaller memory in training costs less, and can be enlarged afterwards."""
    dropout: float = 0.0
    """Share of rows that do not read their memory, drawn again for each segment."""
    scope: Literal["document", "step"] = "document"
    """How long memories (and XL memory) last: until the document ends, or for the segments of one step (as in the
    original package)."""

    def __post_init__(self) -> None:
        _check_share(self, "last_share", "dropout")
        _check_at_least(0, self, "from_step")
        steps = [step for step, _ in self.growth]
        if steps and (steps[0] < 0 or steps != sorted(set(steps)) or min(size for _, size in self.growth) < 1):
            raise ValueError(f"expected growth as rising steps with at least 1 entry each, got {self.growth}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop: how many steps, how much per step, and how often to validate, save and log."""

    steps: int = 2_000
    """Optimiser steps."""
    rows: int = 4
    """Documents that are read side by side, over all processes."""
    segment_length: int = 512
    """Tokens of each row in a segment: the local context."""
    segments: int = 1
    """Segments of each row that one step reads, one after the other; gradients are accumulated."""
    row_groups: int = 1
    """Parts into which the rows of a process are divided to save memory; gradients are accumulated."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    on_nan: Literal["stop", "skip"] = "stop"
    """On a loss or gradient that is not finite: stop, or skip the step and count it."""
    validate_every: int = 250
    """Steps between validations; the best checkpoint is that with the lowest loss then."""
    validation_tokens: int = 4_096
    """Tokens that are read of each validation document."""
    validation_documents: int = 32
    """Validation documents that are read, the longest ones."""
    checkpoint_every: int = 250
    """Steps between checkpoints, from which a run resumes exactly."""
    log_every: int = 10
    """Steps between records of what the memory does (attention mass, age, recall)."""
    tensorboard: bool = False
    """Write metrics for TensorBoard too."""

    def __post_init__(self) -> None:
        sizes = ("steps", "rows", "segment_length", "segments", "row_groups")
        every = ("validate_every", "validation_tokens", "validation_documents", "checkpoint_every", "log_every")
        _check_at_least(1, self, *sizes, *every)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run, whole."""

    output: Path | None = None
    """Folder of the run. Without one: runs/PRESET, or the next free name (runs/PRESET-2 ...)."""
    seed: int = 0
    """Of the weights, the order of documents and dropout."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to train: what accelerate finds, or the CPU."""
    init_from: Path | None = None
    """A run or a checkpoint file whose weights to start from, for finetuning (e.g. with a larger memory)."""
    model: ModelConfig
    """The model and its memories."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser and its learning rate."""
    memory: MemoryConfig = MemoryConfig()
    """When the memory is read."""
    training: TrainingConfig = TrainingConfig()
    """The loop."""

    def check(self) -> None:
        """Raises ValueError for parts that do not fit together."""
        largest = max((entries for _, entries in self.memory.growth), default=0)
        if largest > self.model.max_knn_memories:
            expected = f"memory.growth up to model.max_knn_memories={self.model.max_knn_memories}"
            raise ValueError(f"expected {expected}, got {largest}")
        for name in ("clear_memories_on_sos_token_id", "clear_memories_on_eos_token_id"):
            if getattr(self.model, name) is not None:
                why = "the stream knows where documents begin"
                raise ValueError(f"expected model.{name} to be None ({why}), got a token")

    @property
    def memory_from_step(self) -> int:
        """The first step that may read memories; `training.steps` if none does."""
        if not self.model.layers_with_memory:
            return self.training.steps
        if self.memory.from_step is not None:
            return self.memory.from_step
        return round(self.training.steps * (1 - self.memory.last_share))

    def entries_at(self, step: int) -> int:
        """How many entries a row keeps at this step, by `memory.growth`."""
        sizes = [size for start, size in self.memory.growth if start <= step]
        if not self.memory.growth:
            return self.model.max_knn_memories
        return sizes[-1] if sizes else self.memory.growth[0][1]
