"""The learning rate of each step."""

from __future__ import annotations

import math

from memorizing_transformers_pytorch.training.config import OptimizerConfig


def learning_rate_at(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step, counted from 0, in a run of so many: linear warm-up, the schedule, linear decay."""
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
