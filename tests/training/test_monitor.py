"""What is said about the memory while training is what a slow look at the layer says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.attention.attention import Reading
from memorizing_transformers_pytorch.training.monitor import recall, watching

LENGTH = 7


def make_model(**changes: Any) -> MemorizingTransformer:
    fields = {"num_tokens": 19, "dim": 16, "depth": 3, "dim_head": 8, "heads": 4, "memorizing_layers": (1, 3)}
    return MemorizingTransformer(**{**fields, "num_retrieved_memories": 3, "max_knn_memories": 40, **changes})


def segment(start: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, 19, (2, LENGTH))
    positions = torch.arange(start, start + LENGTH).expand(2, LENGTH)
    return tokens, torch.stack((torch.zeros_like(positions), positions, tokens), dim=-1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"combine": "gate"}, {"num_kv_heads": 2}, {"shift_knn_memories_down": 1}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_every_memorizing_layer_is_seen(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    with model.knn_memories_context(batch_size=2) as memories:
        for start in (0, LENGTH):
            tokens, origins = segment(start)
            model(tokens, memories, origins=origins)
        tokens, origins = segment(2 * LENGTH)
        with watching(model, memories) as seen:
            model(tokens, memories, origins=origins, labels=tokens).backward()
    assert set(seen) == {"layer 1", "layer 3"}
    for layer in seen.values():
        assert len(layer["mass"]) == len(layer["temperature"]) == 4
        assert all(0 < mass < 1 for mass in layer["mass"])
        assert layer["temperature"] == pytest.approx([20.0] * 4, rel=1e-4)
        assert layer["recall"] == 1.0
        low, middle, high = layer["age"]
        assert 0 <= low <= middle <= high < 2 * LENGTH
        assert ("gate" in layer) == (changes.get("combine") == "gate")


def test_recall_of_an_exact_search_is_1_under_autocast_too() -> None:
    model = make_model(memorizing_layers=2)
    with model.knn_memories_context(batch_size=2) as memories, torch.autocast("cpu", torch.bfloat16):
        for start in range(0, 5 * LENGTH, LENGTH):
            tokens, origins = segment(start)
            with watching(model, memories) as seen:
                model(tokens, memories, origins=origins)
    assert seen["layer 2"]["recall"] == 1.0


def test_nothing_changes_by_being_watched() -> None:
    model, losses = make_model(), []
    for watched in (False, True):
        torch.manual_seed(1)
        with model.knn_memories_context(batch_size=2) as memories:
            for start in (0, LENGTH):
                tokens, origins = segment(start)
                if watched:
                    with watching(model, memories):
                        losses.append(model(tokens, memories, origins=origins, labels=tokens).item())
                else:
                    losses.append(model(tokens, memories, origins=origins, labels=tokens).item())
    assert losses[:2] == losses[2:]


def test_an_empty_memory_has_no_mass_and_no_age() -> None:
    model = make_model()
    tokens, origins = segment(0)
    with model.knn_memories_context(batch_size=2) as memories, watching(model, memories) as seen:
        model(tokens, memories, origins=origins)
    assert all(set(layer) == {"temperature"} for layer in seen.values())


def test_recall_counts_what_an_index_missed() -> None:
    model = make_model(memorizing_layers=1)
    with model.knn_memories_context(batch_size=2) as memories:
        for start in (0, LENGTH):
            tokens, origins = segment(start)
            model(tokens, memories, origins=origins)
        queries = torch.nn.functional.normalize(torch.randn(2, 4, LENGTH, 8), dim=-1)
        lookup = memories[0].look_up(queries, 3)
        whole = Reading(queries, lookup, torch.ones(1), torch.zeros(2, 4, LENGTH), torch.ones(2, 4, LENGTH, 1))
        assert recall(whole, memories[0], 16) == 1.0
        lookup.mask[..., 2] = False
        assert recall(whole, memories[0], 16) == pytest.approx(2 / 3)
