"""Optimisers and averages of weights (PyTorch's own), and the learning rate of each step."""

from __future__ import annotations

import math

from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from memorizing_transformers_pytorch.training.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> optim.Optimizer:
    """AdamW, or Adafactor, whose steps are the learning rate times the size of the weights. The loop sets the rate.

    PyTorch's Adafactor does not go above 1 / sqrt(step): the rate of the paper's schedule after warm-up.
    """
    if config.name == "adafactor":
        return optim.Adafactor(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    return optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )


def make_average(model: nn.Module, config: OptimizerConfig) -> AveragedModel | None:
    """A copy of the model that holds the exponential moving average of its weights, if one is wanted."""
    if config.ema_decay == 0:
        return None
    follow = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=follow)


def learning_rate_at(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step, counted from 0, in a run of `steps`: linear warm-up, the schedule, linear decay."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_from = max(round(steps * (1 - config.decay_share)), config.warmup_steps)
    if step < decay_from or config.decay_share == 0:
        return _scheduled(config, step, steps)
    left = max(steps - step, 0) / max(steps - decay_from, 1)
    end = config.learning_rate * config.final_share
    return end + (_scheduled(config, decay_from, steps) - end) * left


def _scheduled(config: OptimizerConfig, step: int, steps: int) -> float:
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "rsqrt":
        warmup = max(config.warmup_steps, 1)
        return config.learning_rate * math.sqrt(warmup / max(step, warmup))
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    falling = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return config.learning_rate * (config.final_share + (1 - config.final_share) * falling)
