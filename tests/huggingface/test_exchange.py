"""Several memories take turns with one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface import attach_memory
from tests.huggingface.families import tiny

ONE, TWO = (torch.arange(start, start + 60) % 90 for start in (0, 30))


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ONE[None, :9]).logits
    return found


@pytest.mark.parametrize("options", [{}, {"recent": 20}], ids=["plain", "aging"])
@torch.no_grad()
def test_what_is_kept_comes_back_as_it_was(options: dict[str, Any]) -> None:
    model = tiny("llama")
    memory = attach_memory(model, retrieve="tokens", layers="all", index="exact", **options)
    alone = logits(model)
    memory.read(ONE, document="one", progress=False)
    with_one, entries = logits(model), memory.layers[0].num_entries
    first = memory.exchange(None)
    assert torch.equal(logits(model), alone)
    assert memory.documents() == []
    memory.read(TWO, document="two", progress=False)
    with_two = logits(model)
    second = memory.exchange(first)
    assert torch.equal(logits(model), with_one)
    assert memory.layers[0].num_entries == entries
    assert [each.title for each in memory.documents()] == ["one"]
    memory.read(TWO, document="more", progress=False)
    memory.exchange(second)
    assert torch.equal(logits(model), with_two)
    assert not torch.equal(with_one, with_two)


def test_other_weights_are_noticed_after_an_exchange() -> None:
    model = tiny("llama")
    memory = attach_memory(model, retrieve="tokens", layers="all", index="exact")
    memory.read(ONE, progress=False)
    kept = memory.exchange(None)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    memory.read(TWO, progress=False)
    memory.exchange(kept)
    with pytest.raises(ValueError, match="model weights changed after this memory was written"):
        memory.read(TWO, progress=False)


def test_nothing_is_exchanged_while_it_may_not_change() -> None:
    memory = attach_memory(tiny("llama"), retrieve="tokens", layers="all", index="exact")
    with memory.read_only(), pytest.raises(ValueError, match="read_only"):
        memory.exchange(None)
    with pytest.raises(ValueError, match="writing"), memory.writing():
        memory.exchange(None)
