"""What does not fit is refused by name, and memories and state are as if nothing had been asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from memorizing_transformers_pytorch import KNNMemory, KNNMemoryList, MemorizingTransformer
from memorizing_transformers_pytorch.model.state import XLMemories
from tests.model.helpers import (
    EVERYTHING,
    NUM_TOKENS,
    assert_same_contents,
    call,
    contents,
    origins_of,
    random_tokens,
    refused,
    tiny,
)

B, T = 2, 5


class Scene(NamedTuple):
    """A model in the middle of a text, and a further segment that fits."""

    model: MemorizingTransformer
    memories: KNNMemoryList
    state: XLMemories
    tokens: torch.Tensor


def make_scene() -> Scene:
    model, tokens = tiny(**EVERYTHING), random_tokens(B, 9)
    memories = model.create_knn_memories(batch_size=B)
    state = call(model, tokens, memories).state
    return Scene(model, memories, state, random_tokens(B, T))


def tokens_with(value: int) -> Callable[[Scene], dict[str, Any]]:
    def arguments(scene: Scene) -> dict[str, Any]:
        tokens = scene.tokens.clone()
        tokens[1, 2] = value
        return {"x": tokens}

    return arguments


def labels_with(value: int) -> Callable[[Scene], dict[str, Any]]:
    return lambda scene: {"labels": tokens_with(value)(scene)["x"]}


def memories_of(**changes: Any) -> Callable[[Scene], dict[str, Any]]:
    """Two memories that fit but for these arguments."""
    fields = {"dim": 6, "num_kv_heads": 2, "max_memories": 5, "num_indices": B, **changes}
    return lambda _scene: {"knn_memories": [KNNMemory(**fields), KNNMemory(**fields)]}


def state_of(rows: int = B, **changes: Any) -> Callable[[Scene], dict[str, Any]]:
    """State as a model with these changes returns it."""
    return lambda _scene: {"xl_memories": call(tiny(**{**EVERYTHING, **changes}), random_tokens(rows, 9)).state}


def closed(scene: Scene) -> dict[str, Any]:
    memories = scene.model.create_knn_memories(batch_size=B)
    memories.cleanup()
    return {"knn_memories": memories}


def differently_scoped(scene: Scene) -> dict[str, Any]:
    first, second = scene.model.create_knn_memories(batch_size=B)
    second._scope.put([1, 0])  # until the test ends, in this thread
    return {"knn_memories": [first, second]}


BAD: dict[str, tuple[Callable[[Scene], dict[str, Any]], str]] = {
    "token below 0": (tokens_with(-1), rf"token ids from 0 to {NUM_TOKENS - 1}, got -1"),
    "token above the vocabulary": (
        tokens_with(NUM_TOKENS),
        rf"token ids from 0 to {NUM_TOKENS - 1}, got \d+ to {NUM_TOKENS}",
    ),
    "float tokens": (lambda s: {"x": s.tokens.float()}, "token ids to be a tensor of integers, got torch.float32"),
    "one row without a batch": (lambda s: {"x": s.tokens[0]}, r"token ids \(rows, at least 1\), got .*\(5,\)"),
    "empty segment": (lambda s: {"x": s.tokens[:, :0]}, r"at least 1\), got .*\(2, 0\)"),
    "no rows": (lambda s: {"x": s.tokens[:0]}, r"got .*\(0, 5\)"),
    "other number of rows": (lambda s: {"x": s.tokens[:1], "xl_memories": None}, "1 rows in scope, got 2"),
    "labels of other length": (lambda s: {"labels": s.tokens[:, 1:]}, r"labels \(2, 5\), got .*\(2, 4\)"),
    "float labels": (lambda s: {"labels": s.tokens.double()}, "labels to be a tensor of integers, got torch.float64"),
    "label above the vocabulary": (
        labels_with(NUM_TOKENS),
        f"labels from 0 to {NUM_TOKENS - 1}, or -100, got {NUM_TOKENS}",
    ),
    "label below 0": (labels_with(-1), "or -100, got -1"),
    "float mask": (lambda s: {"mask": torch.ones(B, T)}, r"bool mask \(2, 5\), got torch.float32"),
    "mask of other length": (lambda s: {"mask": torch.ones(B, T + 1).bool()}, r"bool mask \(2, 5\), got .*\(2, 6\)"),
    "origins of two fields": (lambda s: {"origins": origins_of(s.tokens)[..., :2]}, r"\(2, 5, 3\), got .*\(2, 5, 2\)"),
    "float origins": (
        lambda s: {"origins": origins_of(s.tokens).float()},
        "origins to be a tensor of integers",
    ),
    "too few memories": (lambda s: {"knn_memories": s.memories[:1]}, "memories for 2 layers, got 1"),
    "too many memories": (lambda s: {"knn_memories": [*s.memories, *s.memories]}, "memories for 2 layers, got 4"),
    "memories of another width": (memories_of(dim=7), r"\(6, 2, 'float32'\), got \(7, 2, 'float32'\)"),
    "memories of other heads": (memories_of(num_kv_heads=1), r"\(6, 2, 'float32'\), got \(6, 1, 'float32'\)"),
    "memories of another dtype": (memories_of(dtype=torch.float16), r"\(6, 2, 'float32'\), got \(6, 2, 'float16'\)"),
    "memories of other rows": (memories_of(num_indices=3), "2 rows in scope, got 3"),
    "memories that are not scoped alike": (differently_scoped, r"the same rows .*got \[0, 1\] and \[1, 0\]"),
    "closed memories": (closed, "closed by cleanup"),
    "state that is only a list": (
        lambda s: {"xl_memories": list(s.state)},
        "as the preceding call returned them, got list",
    ),
    "state of other XL layers": (state_of(xl_memory_layers=(2,)), r"\(2, 2\), got \(1, 2\)"),
    "state without convolutions": (state_of(short_conv=0), r"\(2, 2\), got \(2, 0\)"),
    "state of a longer XL memory": (state_of(xl_max_memories=6), "at most 5 pairs in xl_memories, got 6"),
    "state of other rows": (state_of(rows=3), "xl_memories of 2 rows, got 3"),
    "state of another width": (state_of(dim_head=7), r"pairs \(2, 2, 5, 2, 6\) in xl_memories, got \(2, 2, 5, 2, 7\)"),
    "state of other heads": (state_of(num_kv_heads=4), r"pairs \(2, 2, 5, 2, 6\) .*got \(2, 4, 5, 2, 6\)"),
    "state of another convolution": (state_of(short_conv=5), r"a state \(2, 2, 36\), got \(2, 4, 36\)"),
}


def assert_refused_without_a_trace(scene: Scene, match: str, arguments: dict[str, Any]) -> None:
    before, state_before = contents(scene.memories), [t.clone() for t in (*scene.state, *scene.state.conv_states)]
    fitting = {"x": scene.tokens, "knn_memories": scene.memories, "xl_memories": scene.state}
    with refused(rf"(?s)^expected .*{match}"):
        scene.model(**{**fitting, **arguments})
    assert_same_contents(contents(scene.memories), before)
    state_after = (*scene.state, *scene.state.conv_states)
    assert all(torch.equal(a, b) for a, b in zip(state_before, state_after, strict=True))
    scene.model(**fitting)  # and goes on as if nothing had happened


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    scene, (make, match) = make_scene(), BAD[name]
    assert_refused_without_a_trace(scene, match, make(scene))


@pytest.mark.parametrize("name", ["to_q", "to_kv"])
def test_weights_that_are_not_numbers_do_not_reach_the_memory(name: str) -> None:
    scene = make_scene()
    weight = getattr(scene.model.layers[1][0].fn, name).weight
    kept = weight.detach().clone()
    before = contents(scene.memories)
    with torch.no_grad():
        weight[0] = torch.nan
    with refused(r"expected .*finite.* got NaN or infinity"):
        scene.model(scene.tokens, scene.memories, scene.state)
    assert_same_contents(contents(scene.memories), before)
    with torch.no_grad():
        weight.copy_(kept)
    scene.model(scene.tokens, scene.memories, scene.state)


def test_numbers_beyond_the_dtype_of_the_memory_do_not_reach_it() -> None:
    model, tokens = tiny(memory_dtype="float16", memorizing_layers=(1, 2)), random_tokens(B, T)
    memories = model.create_knn_memories(batch_size=B)
    model(tokens, memories)
    before = contents(memories)
    with torch.no_grad():
        model.layers[1][0].fn.to_kv.weight.mul_(1e6)
    with refused("expected keys and values that are finite in torch.float16, got NaN or infinity"):
        model(tokens, memories)
    assert_same_contents(contents(memories), before)


def test_the_batch_must_fit_the_scope() -> None:
    scene = make_scene()
    with scene.memories.at_batch_indices([1]), refused("expected memories with 2 rows in scope, got 1"):
        scene.model(scene.tokens, scene.memories, scene.state)


def test_memories_of_another_capacity_fit() -> None:
    scene = make_scene()
    fitting = memories_of(max_memories=7)(scene)["knn_memories"]
    scene.model(scene.tokens, fitting, scene.state)
    scene.model(scene.tokens, fitting, scene.state)
    assert fitting[0].num_entries == (7, 7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_integers_of_any_width_are_the_same_tokens(dtype: torch.dtype) -> None:
    model, tokens = tiny(), random_tokens(B, T)
    memories, expected_memories = (model.create_knn_memories(batch_size=B) for _ in range(2))
    narrow = tokens.to(dtype)
    expected = model(tokens, expected_memories, labels=tokens)
    torch.testing.assert_close(model(narrow, memories, labels=narrow), expected)
    assert_same_contents(contents(memories), contents(expected_memories))


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"batch_size": -1}], ids=str)
def test_memories_for_no_rows_are_refused(fields: dict[str, int]) -> None:
    with refused("expected num_indices to be at least 1, got"):
        tiny().create_knn_memories(**fields)
