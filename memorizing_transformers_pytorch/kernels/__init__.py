"""Triton kernels for what takes the time on a GPU. Tensors in, tensors out; each has a slow twin in plain PyTorch.

`available` says whether a tensor can be given to them. With TRITON_INTERPRET=1 they also run, slowly, on a CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor


def available(tensor: Tensor) -> bool:
    """Whether the kernels can work where this tensor lies, with its dtype (float64 and codes they leave to PyTorch)."""
    on_device = tensor.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return on_device and tensor.is_floating_point() and tensor.itemsize <= 4 and _work_on(tensor.device)


@functools.cache
def _work_on(device: torch.device) -> bool:
    """Whether Triton is there and can compile for this device; if not (it needs a C compiler, say), warns once."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from memorizing_transformers_pytorch.kernels.bags import bag_sums

        numbers, slots = torch.ones(1, 1, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device)
        return bool(bag_sums(numbers, numbers, slots) == 1)
    except Exception as error:  # whatever keeps Triton from working, PyTorch does the same without it
        warnings.warn(f"Triton does not work on {device}; searching and attending without it: {error}", stacklevel=2)
        return False
