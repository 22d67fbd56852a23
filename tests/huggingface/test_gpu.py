"""A memory attached to a model on a GPU gives what one on a CPU gives, wherever its entries lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.explorer import explain
from memorizing_transformers_pytorch.huggingface import attach_memory
from tests.huggingface import spans
from tests.huggingface.families import FEW, ONLY_EAGER, tiny
from tests.huggingface.test_attach import EVERYTHING, logits, tokens

pytestmark = pytest.mark.gpu
AGING = {**EVERYTHING, "recent": 16, "chunk": 8}
DEVICES = ("cpu", "cuda")


def on(device: str, family: str = "llama") -> Any:
    return tiny(family, "eager" if family in ONLY_EAGER else "sdpa").to(device)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.cpu(), other.cpu(), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("place", [None, "cpu"])
@pytest.mark.parametrize("family", FEW)
def test_logits_and_gradients_of_the_biases_are_those_of_a_cpu(family: str, place: str | None) -> None:
    found, ids = [], tokens(2, 9, seed=1)
    for device in DEVICES:
        memory = attach_memory(on(device, family), retrieve="tokens", **EVERYTHING, device=place)
        memory.read(tokens(2, 40), progress=False)
        result = memory.model(input_ids=ids.to(device), labels=ids.to(device))
        result.loss.backward()
        found.append((result.logits.detach(), torch.stack([each.grad for each in memory.parameters()])))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


@pytest.mark.parametrize("options", [{}, {"dtype": torch.int8}, {"dtype": torch.bfloat16}], ids=str)
def test_losses_of_a_long_text_are_those_of_a_cpu(options: dict[str, Any]) -> None:
    found = []
    for device in DEVICES:
        memory = attach_memory(on(device), retrieve="tokens", **{**AGING, "layers": [1], "topk": 9, **options})
        (losses,) = memory.score(tokens(1, 70), progress=False)
        found.append(losses[1:])
    torch.testing.assert_close(found[1].cpu(), found[0], atol=0.05, rtol=0.05, equal_nan=True)


@pytest.mark.parametrize("writing", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_what_is_written_is_what_a_cpu_writes(writing: dict[str, Any]) -> None:
    texts = []
    for device in DEVICES:
        memory = attach_memory(on(device), retrieve="tokens", **EVERYTHING)
        memory.read(tokens(1, 40), progress=False)
        ids = tokens(2, 6, seed=1).to(device)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **writing}
        texts.append(memory.model.generate(ids, attention_mask=torch.ones_like(ids), **options).cpu())
    assert torch.equal(*texts)


def test_a_chat_whose_window_leaves_into_the_memory_is_that_of_a_cpu() -> None:
    texts = []
    for device in DEVICES:
        memory = attach_memory(
            on(device), retrieve="tokens", **{**EVERYTHING, "layers": [1]}, write="window", window=16
        )
        ids = tokens(1, 30).to(device)
        texts.append(memory.model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0).cpu())
        assert sum(part.num_entries[0] for part in memory.layers[1].memories) > 30
    assert torch.equal(*texts)


@pytest.mark.parametrize(("writer", "reader"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_a_folder_written_on_one_device_is_read_on_another(writer: str, reader: str, tmp_path: Path) -> None:
    query, one = tokens(2, 9, seed=1), attach_memory(on(writer), retrieve="tokens", **AGING)
    one.read(tokens(1, 40), document="first", progress=False)
    one.read(tokens(1, 20, seed=2), document="second", progress=False)
    one.save(tmp_path / "memory")
    other = attach_memory(on(reader), retrieve="tokens", **AGING)
    other.load(tmp_path / "memory", mmap=True)
    close(logits(other.model, query.to(reader)), logits(one.model, query.to(writer)))
    for each in (one, other):
        each.forget("first")
    close(logits(other.model, query.to(reader)), logits(one.model, query.to(writer)))
    other.save(tmp_path / "memory")


@pytest.mark.parametrize("contribution", [None, "ablate"])
def test_an_explanation_is_that_of_a_cpu(contribution: str | None) -> None:
    found = []
    for device in DEVICES:
        memory = attach_memory(on(device), retrieve="tokens", **{**EVERYTHING, "topk": 5})
        memory.read(tokens(1, 40), document="a book", progress=False)
        found.append(explain(memory.model, tokens(1, 12, seed=1)[0], memory, contribution=contribution))
    one, other = found
    torch.testing.assert_close(torch.from_numpy(one.mass), torch.from_numpy(other.mass), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        torch.from_numpy(one.losses[1:]), torch.from_numpy(other.losses[1:]), atol=1e-3, rtol=1e-3
    )
    assert one.to_pandas().shape == other.to_pandas().shape


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_passages_serve_any_backend(attention: str) -> None:
    """In bfloat16, which flash attention needs."""
    if attention.startswith("flash"):
        pytest.importorskip("flash_attn")
    found = []
    for backend in ("sdpa", attention):
        model = tiny("llama", backend, hidden_size=64, head_dim=16).to("cuda", torch.bfloat16)
        spans.read(spans.attached(model, span=40), tokens(1, 70))  # all of it is recalled
        with torch.no_grad():
            found.append(model(input_ids=tokens(1, 9, seed=1).cuda()).logits.float())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.05
