"""Forward hooks see what memory does in training, and nobody else keeps it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.attention.attention import Attended, Reading
from tests.model.helpers import call, plant, random_tokens, tiny, variants

T = 7


def watch(model: MemorizingTransformer, seen: list[Reading | None]) -> None:
    def note(_module: nn.Module, _inputs: Any, attended: Attended) -> None:
        seen.append(attended.reading)

    for layer in model.layers:
        layer[0].register_forward_hook(note)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@variants
def test_hooks_see_what_each_memorizing_layer_reads(variant: dict[str, Any], gradient_checkpointing: bool) -> None:
    model = tiny(**variant, gradient_checkpointing=gradient_checkpointing)
    memories, seen = model.create_knn_memories(batch_size=2), []
    for memory in memories:
        plant(memory)
    watch(model, seen)
    loss = call(model, random_tokens(2, T), memories, labels=random_tokens(2, T)).result
    assert [reading is not None for reading in seen] == [n in model.config.layers_with_memory for n in (1, 2, 3)]
    for reading in filter(None, seen):
        shape = (2, model.config.memory_heads, T)
        assert reading.queries.shape == (*shape, 6)
        assert reading.weights.shape == reading.lookup.slots.shape == reading.lookup.mask.shape == (*shape, 3)
        assert not reading.queries.requires_grad
        assert not reading.weights.requires_grad
        total = reading.weights.sum(dim=-1)
        assert bool(((total > 0) & (total < 1)).all())
    loss.backward()


def test_without_memories_nothing_is_read() -> None:
    model, seen = tiny(), []
    watch(model, seen)
    model(random_tokens(2, T))
    assert seen == [None] * 3


def test_hidden_rows_get_no_weight() -> None:
    model, seen = tiny(), []
    memories = model.create_knn_memories(batch_size=2)
    plant(memories[0])
    watch(model, seen)
    model(random_tokens(2, T), memories, hide_memory=torch.tensor([True, False]))
    [reading] = filter(None, seen)
    assert not reading.weights[0].any()
    assert reading.weights[1].all()


@pytest.mark.parametrize("training", [False, True])
def test_what_was_read_is_let_go_before_the_next_layer(training: bool) -> None:
    """In training the graph alone keeps the weights, and only until it is gone."""
    model, alive, at_the_end = tiny(), [], []

    def note(_module: nn.Module, _inputs: Any, attended: Attended) -> None:
        if attended.reading is not None:
            alive.append(weakref.ref(attended.reading.lookup.scores))
            alive.append(weakref.ref(attended.reading.share))

    def look(_module: nn.Module, _inputs: Any) -> None:
        at_the_end.append([ref() is None for ref in alive])

    memories = model.create_knn_memories(batch_size=2)
    plant(memories[0])
    model.layers[1][0].register_forward_hook(note)
    model.layers[1][1].register_forward_pre_hook(look)
    with torch.set_grad_enabled(training):
        result = model(random_tokens(2, T), memories)
    assert at_the_end == [[False, True]]  # the search is kept for gradient checkpointing until the call ends
    assert result.requires_grad == training
    del result
    gc.collect()
    assert [ref() is None for ref in alive] == [True, True]
