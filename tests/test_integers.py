"""Token ids, labels and origins of any integer type give what int64 gives; anything else is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch import KNNMemory, MemorizingTransformer
from memorizing_transformers_pytorch.model.generation import generate
from memorizing_transformers_pytorch.model.session import Session

INTEGERS = [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
OTHERS = [torch.bool, torch.float32, torch.float16, torch.complex64]
IDS = torch.randint(1, 99, (1, 20), generator=torch.Generator().manual_seed(0))


def own() -> MemorizingTransformer:
    torch.manual_seed(0)
    return MemorizingTransformer(num_tokens=99, dim=16, depth=2, dim_head=8, heads=2, pad_id=0).eval()


def origins(ids: Tensor) -> Tensor:
    return torch.stack((torch.ones_like(IDS).to(ids.dtype), torch.arange(20)[None].to(ids.dtype), ids), dim=-1)


def forward(ids: Tensor) -> Any:
    model = own()
    with model.knn_memories_context(batch_size=1) as memories:
        loss = model(ids, memories, labels=ids, origins=origins(ids))
        return [loss, *[list(memory.entries(0)) for memory in memories]]


def labels_alone(ids: Tensor) -> Any:
    return own()(IDS, labels=ids)


def origins_alone(ids: Tensor) -> Any:
    return own()(IDS, origins=origins(ids))


def session(ids: Tensor) -> Any:
    model = own()
    with model.knn_memories_context(batch_size=1) as memories:
        return Session(model, memories, batch_size=1, segment_length=8).read(ids)


def continued(ids: Tensor) -> Any:
    return generate(own(), ids, max_new_tokens=3, temperature=0)


def added(ids: Tensor) -> Any:
    with KNNMemory(4, 30) as memory:
        memory.add(torch.ones(1, 20, 2, 4), origins=origins(ids))
        return list(memory.entries(0))


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("llama", vocab_size=99, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def attached(ids: Tensor) -> Any:
    from memorizing_transformers_pytorch.huggingface import attach_memory

    memory = attach_memory(llama(), retrieve="tokens", layers=[0], skip_first=0)
    memory.read(ids, progress=False)
    (losses,) = memory.score(ids, progress=False)
    return [losses[1:], list(memory.entries(0, 0))]


def causal_lm(ids: Tensor) -> Any:
    pytest.importorskip("transformers")
    from memorizing_transformers_pytorch.huggingface import (
        MemorizingTransformerConfig,
        MemorizingTransformerForCausalLM,
    )

    torch.manual_seed(0)
    config = MemorizingTransformerConfig({"num_tokens": 99, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2})
    model = MemorizingTransformerForCausalLM(config).eval()
    return [model(ids, labels=ids).loss, model(ids, use_cache=True).logits]


BOUNDARIES = [forward, labels_alone, origins_alone, session, continued, added, attached, causal_lm]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_integers_of_any_type_are_the_same_numbers(boundary: Callable[[Tensor], Any]) -> None:
    expected = boundary(IDS)
    for dtype in INTEGERS:
        torch.testing.assert_close(boundary(IDS.to(dtype)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_what_are_no_integers_is_refused(boundary: Callable[[Tensor], Any]) -> None:
    for dtype in OTHERS:
        with pytest.raises(ValueError, match="to be a tensor of integers, got torch"):
            boundary(IDS.to(dtype))
    if boundary is not origins_alone:
        wrong = torch.full((1, 20), -1).view(torch.uint64) if boundary is added else IDS + 99
        with pytest.raises(ValueError, match="expected"):
            boundary(wrong)
