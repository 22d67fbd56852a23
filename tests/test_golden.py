"""The numbers of the original package 0.4.1, where it is right: exact retrieval, below capacity, no XL memory.

The file is made by scripts/make_golden.sh, which runs the original and checks that its approximate index was exact.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.model.checkpoint import load_weights

GOLDEN = Path(__file__).parent / "golden" / "original.safetensors"


def test_a_checkpoint_of_the_original_gives_the_outputs_of_the_original() -> None:
    with safe_open(GOLDEN, framework="pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    config = json.loads(about["config"])
    model = MemorizingTransformer(**config).eval()
    load_weights(model, {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")})
    segments = tensors["tokens"].split(int(about["segment_length"]), dim=1)
    with torch.no_grad(), model.knn_memories_context(batch_size=2) as memories:
        logits = torch.cat([model(segment, memories) for segment in segments], dim=1)
        assert memories[0].num_entries == (57, 57)
        without_memory = torch.cat([model(segment) for segment in segments], dim=1)
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-5, rtol=0)
    assert (without_memory - tensors["logits"]).abs().max() > 0.01  # so the memory was part of what was compared
