"""Half precision and autocast give about what float32 gives, and train."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch

from memorizing_transformers_pytorch import MemorizingTransformer
from tests.model.helpers import Entries, call, contents, random_tokens, tiny, variants


class Trained(NamedTuple):
    """The loss of each segment, all gradients as one vector, and what was stored."""

    losses: torch.Tensor
    gradients: torch.Tensor
    stored: list[list[Entries]]


def train(model: MemorizingTransformer, autocast: AbstractContextManager[Any], tokens: torch.Tensor) -> Trained:
    """Segments one after the other, then one backward."""
    memories, state, losses = model.create_knn_memories(batch_size=tokens.shape[0]), None, []
    with autocast:
        for segment in tokens.split(9, dim=1):
            loss, state = call(model, segment, memories, state, labels=segment)
            losses.append(loss)
    torch.stack(losses).mean().backward()
    vector = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    return Trained(torch.stack(losses).detach(), vector, contents(memories))


def make(variant: dict[str, Any], dtype: torch.dtype, **changes: Any) -> MemorizingTransformer:
    torch.manual_seed(1)
    return tiny(**variant, **changes).to(dtype)


def assert_close_to(reference: Trained, got: Trained) -> None:
    """The losses are near; rounding may choose other entries, but the gradients point the same way."""
    assert got.losses.isfinite().all()
    assert got.gradients.isfinite().all()
    torch.testing.assert_close(got.losses, reference.losses, rtol=0.03, atol=0, check_dtype=False)
    assert torch.cosine_similarity(got.gradients, reference.gradients, dim=0) > 0.97
    assert [[row.origins.tolist() for row in rows] for rows in got.stored] == [
        [row.origins.tolist() for row in rows] for rows in reference.stored
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast_dtype"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, None),
    ],
    ids=str,
)
@variants
def test_models_train_in_any_precision(
    variant: dict[str, Any], dtype: torch.dtype, autocast_dtype: torch.dtype | None, checkpointing: bool
) -> None:
    tokens = random_tokens(2, 27)
    reference = train(make(variant, torch.float32), nullcontext(), tokens)
    autocast = nullcontext() if autocast_dtype is None else torch.autocast("cpu", autocast_dtype)
    got = train(make(variant, dtype, gradient_checkpointing=checkpointing), autocast, tokens)
    assert_close_to(reference, got)


@pytest.mark.parametrize("memory_dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@variants
def test_memories_hold_any_precision(variant: dict[str, Any], dtype: torch.dtype, memory_dtype: str) -> None:
    tokens = random_tokens(2, 27)
    reference = train(make(variant, torch.float32), nullcontext(), tokens)
    got = train(make(variant, dtype, memory_dtype=memory_dtype), nullcontext(), tokens)
    assert got.stored[0][0].keys.dtype == {"int8": torch.float32}.get(memory_dtype, getattr(torch, memory_dtype))
    assert_close_to(reference, got)


def test_logits_come_in_the_precision_of_the_model_and_losses_in_float32() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        model, tokens = make({}, dtype), random_tokens(2, 5)
        assert model(tokens, model.create_knn_memories(batch_size=2)).dtype == dtype
        assert model(tokens, labels=tokens).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stored_keys_are_those_of_float32_but_for_rounding(dtype: torch.dtype) -> None:
    tokens = random_tokens(2, 9)
    stored = []
    for precision in (torch.float32, dtype):
        model = make({"memorizing_layers": 1}, precision)
        memories = model.create_knn_memories(batch_size=2)
        model(tokens, memories)
        stored.append(contents(memories)[0][0])
    torch.testing.assert_close(stored[1].keys, stored[0].keys, rtol=0, atol=0.03)
    torch.testing.assert_close(stored[1].keys.norm(dim=-1), torch.ones(1, 9), rtol=0, atol=0.01)
