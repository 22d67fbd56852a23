"""Quantised models have a memory of what they compute, whatever their weights are packed into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from memorizing_transformers_pytorch.huggingface import attach_memory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torchao")


class InBuffers(nn.Module):
    """Weights in buffers, as GPTQ and AWQ have them: no parameter is left."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight * self.scales)


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and "head" not in name:
                setattr(module, name, make(child))


def in_buffers(model: nn.Module) -> None:
    replaced(model, InBuffers)


def with_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def with_bitsandbytes_4bit(model: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def packed(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype)
        new.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False)
        return new.to("cpu")

    replaced(model, packed)


def with_bitsandbytes_8bit(model: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def packed(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
        return new.to("cpu")

    replaced(model, packed)


WAYS = [in_buffers, with_torchao, with_bitsandbytes_4bit, with_bitsandbytes_8bit]


def quantised(way: Callable[[nn.Module], None], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    way(model)
    return model


IDS = torch.randint(1, 99, (1, 60), generator=torch.Generator().manual_seed(0))


def generated(model: Any) -> list[int]:
    return model.generate(IDS[:, :9], max_new_tokens=5, do_sample=False, pad_token_id=0)[0].tolist()


@pytest.mark.parametrize("way", WAYS)
def test_a_quantised_model_reads_scores_generates_saves_and_loads(
    way: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    model = quantised(way)
    bare = generated(model)
    memory = attach_memory(model, retrieve="tokens", layers=[1], skip_first=0)
    assert generated(model) == bare
    memory.read(IDS, progress=False)
    held = memory._at_work.contents.memories()
    assert {each.dtype for each in held} == {torch.float32}
    assert all(parameter.is_floating_point() for parameter in memory.parameters())
    (losses,) = memory.score(IDS, progress=False)
    assert losses[1:].isfinite().all()
    expected = generated(model)
    memory.save(tmp_path / "memory")
    memory.detach()
    assert generated(model) == bare

    again = attach_memory(quantised(way), retrieve="tokens", layers=[1], skip_first=0)
    again.load(tmp_path / "memory")
    assert generated(again.model) == expected


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_quantised_later_are_noticed(way: Callable[[nn.Module], None]) -> None:
    model = quantised(lambda _: None)
    memory = attach_memory(model, retrieve="tokens", layers=[1])
    memory.read(IDS, progress=False)
    way(model)
    with pytest.raises(ValueError, match="model weights changed after this memory was written"):
        memory.read(IDS, progress=False)


def test_a_memory_has_the_dtype_that_flows() -> None:
    memory = attach_memory(quantised(with_torchao, torch.bfloat16), retrieve="tokens", layers="auto")
    memory.read(IDS, progress=False)
    assert {each.dtype for each in memory._at_work.contents.memories()} == {torch.bfloat16}
