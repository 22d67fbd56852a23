"""Triton kernels for what takes the time on a GPU. Tensors in, tensors out; each has a slow twin in plain PyTorch.

`available` says whether a tensor can be given to them. With TRITON_INTERPRET=1 they also run, slowly, on a CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor

__all__ = ["available"]


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def available(tensor: Tensor) -> bool:
    """Whether the kernels can work where this tensor lies, with its dtype (float64 they leave to PyTorch)."""
    on_device = tensor.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return on_device and tensor.itemsize <= 4 and _installed()
