"""ModelConfig holds what makes sense, refuses the rest, and survives JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing_transformers_pytorch import MemorizingTransformer, ModelConfig
from memorizing_transformers_pytorch.model.config import PRESETS, ModelFields
from tests.amounts import some
from tests.model.helpers import refused

SMALLEST: dict[str, Any] = {"num_tokens": 11, "dim": 8, "depth": 3}


def test_defaults_are_those_of_the_original() -> None:
    config = ModelConfig(num_tokens=256, dim=512, depth=8)
    original = {
        "dim_head": 64,
        "heads": 8,
        "memory_heads": 8,
        "attn_dropout": 0.0,
        "ff_mult": 4,
        "ff_dropout": 0.0,
        "layers_with_memory": (4,),
        "max_knn_memories": 250_000,
        "num_retrieved_memories": 32,
        "clear_memories_on_sos_token_id": None,
        "clear_memories_on_eos_token_id": None,
        "shift_knn_memories_down": 0,
        "pad_id": 0,
        "xl_max_memories": 0,
        "layers_with_xl": (),
        "shift_xl_memories_down": 0,
    }
    assert {name: getattr(config, name) for name in original} == original


def test_what_is_not_given_follows_what_is() -> None:
    config = ModelConfig(num_tokens=256, dim=512, depth=8)
    larger = dataclasses.replace(config, depth=12, heads=4, xl_max_memories=5)
    assert (larger.layers_with_memory, larger.memory_heads, larger.layers_with_xl) == ((6,), 4, tuple(range(1, 13)))
    assert ModelConfig.from_dict(larger.to_dict()) == larger


def test_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**SMALLEST).dim = 9  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelConfig(11, 8, 3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given_layers", "depth", "resolved"),
    [
        (None, 8, (4,)),
        (None, 1, (1,)),
        (None, 3, (1,)),
        (2, 3, (2,)),
        ((3, 1), 3, (1, 3)),
        ([2, 3], 3, (2, 3)),
        ((), 3, ()),
    ],
)
def test_memorizing_layers_are_resolved(given_layers: Any, depth: int, resolved: tuple[int, ...]) -> None:
    config = ModelConfig(**{**SMALLEST, "depth": depth}, memorizing_layers=given_layers)
    assert config.layers_with_memory == resolved


@pytest.mark.parametrize(
    ("fields", "resolved"),
    [
        ({}, ()),
        ({"xl_max_memories": 4}, (1, 2, 3)),
        ({"xl_max_memories": 4, "xl_memory_layers": 2}, (2,)),
        ({"xl_max_memories": 4, "xl_memory_layers": (3, 2)}, (2, 3)),
        ({"xl_max_memories": 4, "xl_memory_layers": ()}, ()),
    ],
)
def test_xl_layers_are_resolved(fields: dict[str, Any], resolved: tuple[int, ...]) -> None:
    assert ModelConfig(**SMALLEST, **fields).layers_with_xl == resolved


@pytest.mark.parametrize(
    "bad",
    [
        *({name: 0} for name in ("num_tokens", "dim", "depth", "dim_head", "heads", "ff_mult")),
        *({name: 0} for name in ("knn_attn_heads", "num_kv_heads", "max_knn_memories", "num_retrieved_memories")),
        *(
            {name: -1}
            for name in ("xl_max_memories", "shift_knn_memories_down", "shift_xl_memories_down", "short_conv")
        ),
        {"dim": 8.0},
        {"depth": 2.5},
        {"dim": True},
        {"dim": "8"},
        {"depth": "3"},
        {"heads": 8, "num_kv_heads": 3},
        {"heads": 4, "num_kv_heads": 4, "knn_attn_heads": 6},
        {"attn_dropout": 1.0},
        {"attn_dropout": -0.1},
        {"ff_dropout": 1.5},
        {"ff_dropout": float("nan")},
        {"combine": "sum"},
        {"qk_init": "copy"},
        {"memory_dtype": "float64"},
        {"memory_dtype": torch.int16},
        {"qk_init": "induction"},
        {"qk_init": "induction", "short_conv": 1},
        {"memorizing_layers": 4},
        {"memorizing_layers": 0},
        {"memorizing_layers": (1, -1)},
        {"memorizing_layers": (2, 2)},
        {"memorizing_layers": ({},)},
        {"memorizing_layers": (1.0,)},
        {"dim": 2**31},
        {"xl_memory_layers": (1, 4), "xl_max_memories": 3},
        {"xl_memory_layers": 0, "xl_max_memories": 3},
        {"xl_memory_layers": (1, 1), "xl_max_memories": 3},
        {"xl_memory_layers": 2},
        {"pad_id": 11},
        {"pad_id": -1},
        {"pad_id": 0.5},
        {"clear_memories_on_sos_token_id": 11},
        {"clear_memories_on_eos_token_id": -1},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with refused() as error:
        ModelConfig(**{**SMALLEST, **bad})
    assert any(name in str(error.value) for name in bad)


def test_the_model_refuses_the_same() -> None:
    with refused(r"expected heads to be a multiple of num_kv_heads=3, got 8"):
        MemorizingTransformer(**SMALLEST, num_kv_heads=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_memory_dtype_may_be_a_torch_dtype_or_its_name(dtype: torch.dtype) -> None:
    by_dtype, by_name = (ModelConfig(**SMALLEST, memory_dtype=d) for d in (dtype, str(dtype).removeprefix("torch.")))
    assert by_dtype == by_name
    assert MemorizingTransformer.from_config(by_dtype).create_knn_memories(batch_size=1)[0].dtype == dtype


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    num_tokens, depth = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    token_id = st.none() | st.integers(0, num_tokens - 1)
    layers = st.lists(st.integers(1, depth), unique=True).map(tuple) | st.integers(1, depth) | st.none()
    short_conv, xl_max_memories = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    num_kv_heads = draw(st.integers(1, 3))
    heads = st.integers(1, 3).map(lambda repeats: repeats * num_kv_heads)
    size, dropout = st.integers(1, 9), st.floats(0, 1, exclude_max=True)
    return ModelConfig(
        num_tokens=num_tokens,
        dim=draw(size),
        depth=depth,
        dim_head=draw(size),
        heads=draw(heads),
        knn_attn_heads=draw(st.none() | heads),
        num_kv_heads=num_kv_heads,
        attn_dropout=draw(dropout),
        ff_mult=draw(size),
        ff_dropout=draw(dropout),
        memorizing_layers=draw(layers),
        max_knn_memories=draw(size),
        num_retrieved_memories=draw(size),
        combine=draw(st.sampled_from(("softmax", "gate"))),
        memory_dtype=draw(st.sampled_from(("float32", "bfloat16", "float16", "int8"))),
        knn_memories_directory=draw(st.none() | st.just("somewhere")),
        clear_memories_on_sos_token_id=draw(token_id),
        clear_memories_on_eos_token_id=draw(token_id),
        shift_knn_memories_down=draw(st.integers(0, 9)),
        pad_id=draw(token_id),
        xl_max_memories=xl_max_memories,
        xl_memory_layers=draw(layers) if xl_max_memories > 0 else None,
        shift_xl_memories_down=draw(st.integers(0, 9)),
        short_conv=short_conv,
        qk_init=draw(st.sampled_from(("independent", "induction") if short_conv >= 2 else ("independent",))),
        tie_embeddings=draw(st.booleans()),
        gradient_checkpointing=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=some(25, 1_000))
@given(configs())
def test_config_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_directory_given_as_a_path_survives_json(tmp_path: Path) -> None:
    config = ModelConfig(**SMALLEST, knn_memories_directory=tmp_path)  # type: ignore[arg-type]
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert str(again.knn_memories_directory) == str(tmp_path)


def test_unknown_fields_are_refused() -> None:
    with refused(r"expected .* got unknown \['widht'\] and missing \[\]"):
        ModelConfig.from_dict({**SMALLEST, "widht": 3})


def test_missing_fields_are_refused() -> None:
    with refused(r"expected .* got unknown \[\] and missing \['depth', 'num_tokens'\]"):
        ModelConfig.from_dict({"dim": 3})


def test_every_public_argument_of_the_original_is_accepted(tmp_path: Path) -> None:
    model = MemorizingTransformer(
        num_tokens=11,
        dim=8,
        depth=2,
        dim_head=4,
        heads=2,
        knn_attn_heads=1,
        attn_dropout=0.0,
        ff_mult=2,
        ff_dropout=0.0,
        memorizing_layers=(1, 2),
        max_knn_memories=5,
        num_retrieved_memories=2,
        clear_memories_on_sos_token_id=1,
        clear_memories_on_eos_token_id=2,
        knn_memories_directory=str(tmp_path),
        shift_knn_memories_down=1,
        pad_id=0,
        xl_max_memories=3,
        xl_memory_layers=(2,),
        shift_xl_memories_down=1,
        knn_memory_multiprocessing=False,
    )
    with model.knn_memories_context(batch_size=1) as memories:
        logits, state = model(torch.tensor([[5, 6, 7]]), memories)
    assert logits.shape == (1, 3, 11)
    assert len(state) == 1


def num_parameters(c: ModelConfig) -> int:
    """Counted by hand from what the layers are."""
    knn_heads = c.knn_attn_heads or c.heads
    norm, buckets = 2 * c.dim, 32
    feed_forward = norm + c.dim * c.ff_mult * c.dim + c.ff_mult * c.dim + c.ff_mult * c.dim * c.dim + c.dim
    keys_and_values = c.dim * 2 * c.num_kv_heads * c.dim_head
    ordinary = norm + 2 * c.dim * c.heads * c.dim_head + keys_and_values + c.dim
    memorizing = norm + 2 * c.dim * knn_heads * c.dim_head + keys_and_values + knn_heads
    memorizing += knn_heads if c.combine == "gate" else 0
    memorizing += (knn_heads + c.num_kv_heads) * c.dim_head * c.short_conv
    of_layers = sum(memorizing if n in c.layers_with_memory else ordinary for n in range(1, c.depth + 1))
    embedding = c.num_tokens * c.dim
    output = norm + c.num_tokens + (0 if c.tie_embeddings else embedding)
    return embedding + buckets * (c.heads + knn_heads) + of_layers + c.depth * feed_forward + output


def counted(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = MemorizingTransformer.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_as_many_parameters_as_their_layers(name: str) -> None:
    config = ModelConfig.preset(name)
    assert counted(config) == num_parameters(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"knn_attn_heads": 2, "short_conv": 3, "memorizing_layers": (1, 3)},
        {"combine": "gate", "num_kv_heads": 4, "tie_embeddings": True},
        {"memorizing_layers": ()},
    ],
    ids=str,
)
def test_changed_presets_too(changes: dict[str, Any]) -> None:
    config = ModelConfig.preset("enwik8", **changes)
    assert counted(config) == num_parameters(config)


@pytest.mark.parametrize(
    ("name", "millions"), [("enwik8", 22), ("paper-200m", 217), ("paper-1b", 937), ("paper-8b", 6706)]
)
def test_presets_have_the_size_that_they_promise(name: str, millions: int) -> None:
    assert round(counted(ModelConfig.preset(name)) / 1e6) == millions


def test_presets_have_the_shapes_that_they_promise() -> None:
    def shape(name: str) -> tuple[Any, ...]:
        c = ModelConfig.preset(name)
        sizes = (c.num_tokens, c.dim, c.depth, c.heads, c.num_kv_heads)
        return (*sizes, c.layers_with_memory, c.layers_with_xl, c.combine)

    assert shape("enwik8") == (256, 512, 8, 8, 1, (4,), (7, 8), "softmax")
    assert shape("paper-200m") == (32_000, 1024, 12, 8, 8, (9,), tuple(range(1, 13)), "gate")
    assert shape("paper-1b") == (32_000, 2048, 8, 32, 32, (6,), tuple(range(1, 9)), "gate")
    assert shape("paper-8b") == (32_000, 4096, 16, 64, 64, (12,), tuple(range(1, 17)), "gate")


def test_unknown_presets_are_refused() -> None:
    with refused(r"expected a preset among \['enwik8', .*\], got 'enwik9'"):
        ModelConfig.preset("enwik9")


def test_an_editor_completes_just_the_fields_of_the_configuration() -> None:
    fields = {each.name: each.type for each in dataclasses.fields(ModelConfig)}
    assert {name: each.__forward_arg__ for name, each in ModelFields.__annotations__.items()} == fields
