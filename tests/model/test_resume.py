"""A run that stops and goes on from saved state is bit by bit the run that never stopped."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from memorizing_transformers_pytorch import KNNMemoryList, MemorizingTransformer
from memorizing_transformers_pytorch.model.state import XLMemories
from tests.model.helpers import (
    EVERYTHING,
    call,
    random_tokens,
    refused,
    stateful_variants,
    tiny,
    variants,
)

ROWS, T = 3, 7

Segment = tuple[Tensor, Tensor, Tensor]


def random_segments(count: int) -> list[Segment]:
    """tokens, mask and starts."""
    shape = (ROWS, T)
    return [(random_tokens(*shape), torch.rand(shape) < 0.8, torch.rand(shape) < 0.1) for _ in range(count)]


def train(
    model: MemorizingTransformer, segments: list[Segment], memories: KNNMemoryList, state: XLMemories | None
) -> XLMemories | None:
    """Some steps of gradient descent."""
    for tokens, mask, starts in segments:
        model.zero_grad()
        loss, state = call(model, tokens, memories, state, labels=tokens, mask=mask, starts=starts)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return state


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save(state))


@pytest.mark.parametrize("steps_before", [0, 1, 4])
@variants
def test_a_resumed_run_is_the_run_that_never_stopped(variant: dict[str, Any], steps_before: int) -> None:
    model, segments = tiny(**variant, max_knn_memories=11), random_segments(9)
    memories = model.create_knn_memories(batch_size=ROWS)
    state = train(model, segments[:steps_before], memories, None)

    resumed = tiny(**variant, max_knn_memories=11)
    resumed.load_state_dict(through_a_file(model.state_dict()))
    resumed_memories = resumed.create_knn_memories(batch_size=ROWS)
    resumed_memories.load_state_dict(through_a_file(memories.state_dict()))
    resumed_state = None if state is None else XLMemories.from_state_dict(through_a_file(state.state_dict()))

    state = train(model, segments[steps_before:], memories, state)
    resumed_state = train(resumed, segments[steps_before:], resumed_memories, resumed_state)
    ends = [
        {**each.state_dict(), **these.state_dict(), **({} if last is None else last.state_dict())}
        for each, these, last in ((model, memories, state), (resumed, resumed_memories, resumed_state))
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(part, ends[1][name]) for name, part in ends[0].items())


@stateful_variants
def test_state_at_the_beginning_can_be_saved(variant: dict[str, Any]) -> None:
    """The empty pairs of all layers are one tensor, which safetensors would not take."""
    model, tokens = tiny(**variant), random_tokens(ROWS, T)
    state = XLMemories.from_state_dict(through_a_file(model.initial_state(ROWS).state_dict()))
    assert torch.equal(call(model, tokens, None, state).result, call(model, tokens).result)


def test_saved_state_is_a_copy_without_gradient() -> None:
    model = tiny(**EVERYTHING)
    state = call(model, random_tokens(ROWS, T)).state
    assert state is not None
    saved = state.state_dict()
    assert sorted(saved) == ["conv_states.0", "conv_states.1", "origins", "pairs.0", "pairs.1"]
    assert not any(part.requires_grad for part in saved.values())
    assert all(part.is_contiguous() for part in saved.values())
    saved["pairs.0"].zero_()
    assert state[0].all()
    assert "mask" in state.cleared([1]).state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"origins": None},
        {"origins": torch.zeros(ROWS, 5)},
        {"pairs.0": None},
        {"conv_states.0": None},
        {"pairs.7": torch.zeros(())},
        {"scores": torch.zeros(())},
    ],
    ids=str,
)
def test_state_of_other_parts_is_refused(change: dict[str, Tensor | None]) -> None:
    state = call(tiny(**EVERYTHING), random_tokens(ROWS, T)).state
    assert state is not None
    parts = {name: part for name, part in {**state.state_dict(), **change}.items() if part is not None}
    with refused():
        XLMemories.from_state_dict(parts)


@pytest.mark.parametrize("mask", [torch.ones(ROWS, 5), torch.ones(ROWS, 4).bool(), torch.ones(2, 5).bool()], ids=str)
def test_a_mask_that_does_not_fit_is_refused_by_the_model(mask: Tensor) -> None:
    model, tokens = tiny(**EVERYTHING), random_tokens(ROWS, T)
    state = call(model, tokens).state
    assert state is not None
    with refused():
        model(tokens, xl_memories=XLMemories.from_state_dict({**state.state_dict(), "mask": mask}))
