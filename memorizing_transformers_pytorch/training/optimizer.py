"""Optimisers and averages of weights: PyTorch's own, by configuration."""

from __future__ import annotations

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
