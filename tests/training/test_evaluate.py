"""Evaluation: each mode differs from the others in the memory alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memorizing_transformers_pytorch import KNNMemory, MemorizingTransformer
from memorizing_transformers_pytorch.training.evaluate import evaluate, shuffled_values


@pytest.fixture
def model() -> MemorizingTransformer:
    return MemorizingTransformer(
        num_tokens=31, dim=16, depth=2, dim_head=8, heads=2, max_knn_memories=50, xl_max_memories=3, short_conv=3
    )


def make_documents(count: int, length: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 31, (count, length)))


@torch.no_grad()
def read_by_itself(model: MemorizingTransformer, tokens: torch.Tensor, segment: int, memory: bool) -> torch.Tensor:
    memories, state, losses = model.create_knn_memories(batch_size=1) if memory else None, None, []
    for start in range(0, len(tokens) - 1, segment):
        stop = min(start + segment, len(tokens) - 1)
        mask = torch.ones(1, stop - start, dtype=torch.bool)
        logits, state = model(tokens[None, start:stop], memories, state, mask=mask)
        losses.append(F.cross_entropy(logits[0], tokens[start + 1 : stop + 1], reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("controls", [False, True])
def test_on_and_off_are_what_each_document_gives_by_itself(model: MemorizingTransformer, controls: bool) -> None:
    documents = make_documents(3, 25)
    losses = evaluate(model, documents, segment_length=7, max_tokens=23, controls=controls)
    for row, document in enumerate(documents):
        tokens = torch.from_numpy(document[:24])
        torch.testing.assert_close(losses["on"][row], read_by_itself(model, tokens, 7, memory=True))
        torch.testing.assert_close(losses["off"][row], read_by_itself(model, tokens, 7, memory=False))


def test_controls_differ_from_both_as_soon_as_there_is_a_memory(model: MemorizingTransformer) -> None:
    losses = evaluate(model, make_documents(3, 30), segment_length=7, max_tokens=28, controls=True)
    assert list(losses) == ["off", "other", "shuffled", "on"]
    for control in ("other", "shuffled"):
        torch.testing.assert_close(losses[control][:, :7], losses["on"][:, :7])
        assert all((losses[control][:, 14:] - losses[mode][:, 14:]).abs().max() > 1e-4 for mode in ("on", "off"))


def test_the_same_documents_have_the_same_memory_as_their_neighbour(model: MemorizingTransformer) -> None:
    losses = evaluate(model, [make_documents(1, 30)[0]] * 3, segment_length=7, max_tokens=28, controls=True)
    torch.testing.assert_close(losses["other"], losses["on"])


def test_the_model_is_left_as_it_was(model: MemorizingTransformer) -> None:
    model.train()
    evaluate(model, make_documents(2, 9), segment_length=7, max_tokens=8)
    assert model.training


def test_shuffled_values_are_put_back() -> None:
    memory = KNNMemory(dim=3, max_memories=9, num_indices=2)
    memory.add(torch.randn(2, 7, 2, 3))
    before = memory.store.values.clone()
    with shuffled_values(memory, torch.Generator().manual_seed(0)):
        inside = memory.store.values.clone()
    assert torch.equal(memory.store.values, before)
    assert not torch.equal(inside, before)
    assert torch.equal(inside[0, 0].sort(dim=0).values, before[0, 0].sort(dim=0).values)


def test_documents_that_are_too_short_or_too_few_are_refused(model: MemorizingTransformer) -> None:
    with pytest.raises(ValueError, match=r"expected documents of more than 8 tokens, got \[9, 8\]"):
        evaluate(model, [*make_documents(1, 9), *make_documents(1, 8)], segment_length=7, max_tokens=8)
    with pytest.raises(ValueError, match="expected at least 2 documents"):
        evaluate(model, make_documents(1, 9), segment_length=7, max_tokens=8, controls=True)
