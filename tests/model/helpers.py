"""Tiny models, reading a text in segments, and what is in a memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch import KNNMemory, KNNMemoryList, MemorizingTransformer
from memorizing_transformers_pytorch.model.state import XLMemories

NUM_TOKENS = 43
FIRST_ORDINARY = 4  # the tokens below may be padding, SOS or EOS
SOS, EOS = 1, 2

# Every part of the model that could disagree with another, in few configurations.
XL = {"xl_max_memories": 5, "xl_memory_layers": (2, 3)}
EVERYTHING = {
    "memorizing_layers": (2, 3),
    "xl_max_memories": 5,
    "xl_memory_layers": (1, 3),
    "short_conv": 3,
    "shift_knn_memories_down": 1,
    "shift_xl_memories_down": 1,
    "num_kv_heads": 2,
}
VARIANTS = {
    "plain": {},
    "xl": XL,
    "xl in the memorizing layer only": {"xl_max_memories": 4, "xl_memory_layers": 2},
    "conv": {"short_conv": 4, "qk_init": "induction"},
    "gate": {"combine": "gate", "num_kv_heads": 4, "memorizing_layers": (1, 2)},
    "everything": EVERYTHING,
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
STATEFUL = {name: fields for name, fields in VARIANTS.items() if {"xl_max_memories", "short_conv"} & fields.keys()}
stateful_variants = pytest.mark.parametrize("variant", STATEFUL.values(), ids=STATEFUL.keys())


def tiny(**changes: Any) -> MemorizingTransformer:
    """A small model in float64, so that two ways to the same numbers agree closely; memories hold float32.

    Its position biases are large, so that a wrong distance shows.
    """
    fields = {
        "num_tokens": NUM_TOKENS,
        "dim": 20,
        "depth": 3,
        "dim_head": 6,
        "heads": 4,
        "memorizing_layers": 2,
        "max_knn_memories": 23,
        "num_retrieved_memories": 3,
        "pad_id": None,
    }
    model = MemorizingTransformer(**{**fields, **changes}).double()
    for bias in (model.rel_pos_bias, model.knn_rel_pos_bias):
        nn.init.normal_(bias.relative_attention_bias.weight)
    return model


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(FIRST_ORDINARY, NUM_TOKENS, shape)


def origins_of(tokens: Tensor, first_position: int = 0, document: int = -1) -> Tensor:
    """Origins (B, T, 3) of tokens (B, T) that begin at this position of their documents."""
    positions = torch.arange(first_position, first_position + tokens.shape[1]).expand_as(tokens)
    return torch.stack((torch.full_like(tokens, document), positions, tokens), dim=-1)


class Call(NamedTuple):
    """What one call of the model returned. `state` is None for models that carry none."""

    result: Tensor
    state: XLMemories | None


def call(model: MemorizingTransformer, *args: Any, **kwargs: Any) -> Call:
    result = model(*args, **kwargs)
    return Call(*result) if model.carries_state else Call(result, None)


def read(
    model: MemorizingTransformer,
    tokens: Tensor,
    memories: KNNMemoryList | None,
    segment_length: int,
    state: XLMemories | None = None,
) -> Call:
    """The logits of tokens (B, N), read in segments, and the state in the end. Origins are positions in the text."""
    logits = []
    for start in range(0, tokens.shape[1], segment_length):
        segment = tokens[:, start : start + segment_length]
        logit, state = call(model, segment, memories, state, origins=origins_of(segment, start))
        logits.append(logit)
    return Call(torch.cat(logits, dim=1), state)


class Entries(NamedTuple):
    """What one row of a memory holds: keys and values (G, n, D), origins (n, 3)."""

    keys: Tensor
    values: Tensor
    origins: Tensor

    @property
    def positions(self) -> list[int]:
        return sorted(self.origins[:, 1].tolist())

    @property
    def tokens(self) -> list[int]:
        """In order of position."""
        return self.origins[self.origins[:, 1].argsort(stable=True), 2].tolist()


def entries(memory: KNNMemory, row: int) -> Entries:
    store, count = memory.store, memory.num_entries[row]
    keys, values = (part[row, :, :count].clone().floats() for part in (store.keys, store.values))
    return Entries(keys, values, store.origins[row, :count].clone())


def contents(memories: Sequence[KNNMemory]) -> list[list[Entries]]:
    """Everything in these memories: of each, what each row holds."""
    return [[entries(memory, row) for row in range(memory.num_indices)] for memory in memories]


def assert_same_entries(left: Entries, right: Entries, tolerance: float = 0.0) -> None:
    assert torch.equal(left.origins, right.origins)
    torch.testing.assert_close(left.keys, right.keys, rtol=0, atol=tolerance)
    torch.testing.assert_close(left.values, right.values, rtol=0, atol=tolerance)


def assert_same_contents(
    left: Sequence[Sequence[Entries]], right: Sequence[Sequence[Entries]], tolerance: float = 0.0
) -> None:
    assert [len(rows) for rows in left] == [len(rows) for rows in right]
    for left_rows, right_rows in zip(left, right, strict=True):
        for left_row, right_row in zip(left_rows, right_rows, strict=True):
            assert_same_entries(left_row, right_row, tolerance)


def plant(memory: KNNMemory, count: int = 9) -> None:
    """Fill every row with entries that the model did not write: keys of length 1, values large enough to be seen."""
    shape = (len(memory.scoped_indices), memory.num_kv_heads, count, memory.dim)
    keys, values = torch.nn.functional.normalize(torch.randn(shape), dim=-1), 3 * torch.randn(shape)
    memory.add(torch.stack((keys, values), dim=-2))


def attention_outputs(model: MemorizingTransformer, run: Callable[[], Any]) -> list[Tensor]:
    """What the attention block of each layer gives while `run` calls the model once."""
    outputs: list[Tensor] = []
    hooks = [
        layer[0].register_forward_hook(lambda _module, _inputs, attended: outputs.append(attended.out.detach()))
        for layer in model.layers
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def first_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> int:
    """The first layer, from 0, whose outputs differ."""
    return next(i for i, (a, b) in enumerate(zip(left, right, strict=True)) if not torch.equal(a, b))


def gradients(model: MemorizingTransformer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def refused(match: str = r"(?s)^expected .*got") -> AbstractContextManager[Any]:
    """A ValueError that names what was expected and what came."""
    return pytest.raises(ValueError, match=match)
