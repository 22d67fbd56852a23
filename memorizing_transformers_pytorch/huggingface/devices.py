"""Where a module computes, also when accelerate keeps its weights elsewhere until they are needed."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device of its weights, or to which accelerate brings them."""
    for each in module.modules():
        hook = getattr(each, "_hf_hook", None)
        if hook is not None and getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(chain(module.parameters(), module.buffers())).device
