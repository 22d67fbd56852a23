"""A model in a file: what is saved is what is loaded, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from memorizing_transformers_pytorch.model import checkpoint
from memorizing_transformers_pytorch.model.checkpoint import load_checkpoint, load_weights, save_checkpoint
from tests.model.helpers import EVERYTHING, random_tokens, read, refused, tiny, variants


@pytest.mark.parametrize("tied", [False, True])
@variants
def test_what_is_saved_is_loaded_bit_for_bit(variant: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model, tokens = tiny(**variant, tie_embeddings=tied).float(), random_tokens(2, 18)
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    expected, got = model.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    logits = [read(m, tokens, m.create_knn_memories(batch_size=2), segment_length=6).result for m in (model, loaded)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_precisions_survive_too(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(tie_embeddings=True).to(dtype)
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors").state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)


def test_tied_weights_stay_tied_and_are_saved_once(tmp_path: Path) -> None:
    model, path = tiny(tie_embeddings=True), tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    assert [name for name, tensor in load_file(path).items() if tensor.shape == (43, 20)] == ["token_emb.weight"]
    loaded = load_checkpoint(path)
    assert loaded.to_logits[1].weight is loaded.token_emb.weight


def test_a_checkpoint_may_be_named_by_a_string_in_a_folder_that_is_new(tmp_path: Path) -> None:
    path = f"{tmp_path}/new/folder/model.safetensors"
    save_checkpoint(tiny(), path)
    assert load_checkpoint(path, device="cpu").config == tiny().config
    assert [file.name for file in Path(path).parent.iterdir()] == ["model.safetensors"]


def test_saving_replaces_the_file_that_was_there(tmp_path: Path) -> None:
    path, models = tmp_path / "model.safetensors", [tiny(), tiny(**EVERYTHING)]
    for model in models:
        save_checkpoint(model, path)
    assert load_checkpoint(path).config == models[1].config


def test_saving_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "model.safetensors", tiny()
    save_checkpoint(model, path)
    before = path.read_bytes()

    def fail_halfway(_weights: dict[str, Tensor], file: Path, **_kwargs: Any) -> None:
        Path(file).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail_halfway)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tiny(), path)
    assert path.read_bytes() == before


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(tiny(), path)
    with safe_open(path, framework="pt") as file:
        assert "model_config" in file.metadata()
    assert not path.read_bytes().startswith((b"PK", b"\x80"))


# What does not fit


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.__delitem__(name)


def with_extra(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.__setitem__(name, torch.zeros(1))


def with_shape(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.__setitem__(name, torch.zeros(shape))


CHANGES: list[tuple[list[Callable[[dict[str, Tensor]], None]], str]] = [
    ([without("token_emb.weight")], r"missing \['token_emb.weight'\] and unknown \[\]"),
    ([with_extra("head.bias")], r"missing \[\] and unknown \['head.bias'\]"),
    (
        [without("to_logits.1.bias"), without("layers.1.0.fn.scale"), with_extra("b"), with_extra("a")],
        r"missing \['layers.1.0.fn.scale', 'to_logits.1.bias'\] and unknown \['a', 'b'\]",
    ),
    ([with_shape("token_emb.weight", 42, 20)], r"token_emb.weight: \(43, 20\), got \(42, 20\)"),
    (
        [with_shape("to_logits.1.bias", 42), with_shape("layers.0.0.norm.bias", 20, 1)],
        r"(?=.*to_logits.1.bias: \(43,\), got \(42,\))(?=.*layers.0.0.norm.bias: \(20,\), got \(20, 1\))",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_weights_that_do_not_fit_are_listed_and_change_nothing(
    changes: list[Callable[[dict[str, Tensor]], None]], message: str, tmp_path: Path
) -> None:
    model, path = tiny(), tmp_path / "model.safetensors"
    weights = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    for change in changes:
        change(weights)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with refused(f"expected .*{message}"):
        load_weights(model, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    save_checkpoint(model, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(weights, path, metadata=metadata)
    with refused(f"expected .*{message}"):
        load_checkpoint(path)


def test_weights_of_another_model_of_the_same_shape_are_taken(tmp_path: Path) -> None:
    model, other, tokens = tiny(), tiny(), random_tokens(1, 7)
    assert not torch.equal(model(tokens), other(tokens))
    load_weights(model, other.state_dict())
    assert torch.equal(model(tokens), other(tokens))


def not_there(path: Path) -> None:
    pass


def a_folder(path: Path) -> None:
    path.mkdir()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("These are not the weights you are looking for. " * 9)


def a_pickle(path: Path) -> None:
    torch.save(tiny().state_dict(), path)


def cut_short(path: Path) -> None:
    save_checkpoint(tiny(), path)
    path.write_bytes(path.read_bytes()[:-100])


def without_metadata(path: Path) -> None:
    save_file(tiny().state_dict(), path)


def with_other_metadata(path: Path) -> None:
    save_file(tiny().state_dict(), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (not_there, "expected a checkpoint file, got .*, which does not exist"),
        (a_folder, "expected a checkpoint file, got "),
        (empty, "expected a safetensors file, got "),
        (text, "expected a safetensors file, got "),
        (a_pickle, "expected a safetensors file, got "),
        (cut_short, "expected a safetensors file, got "),
        (without_metadata, r"expected 'model_config' in the metadata of .*, got \[\]"),
        (with_other_metadata, r"expected 'model_config' in the metadata of .*, got \['format'\]"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with refused(message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("config", ["not JSON", "[]", '{"num_tokens": 43}', '{"num_tokens": 43, "dim": 0, "depth": 1}'])
def test_a_configuration_that_makes_no_sense_is_refused(config: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tiny().state_dict(), path, metadata={"model_config": config})
    with pytest.raises(ValueError):  # noqa: PT011
        load_checkpoint(path)


@pytest.mark.parametrize(
    "size", ["num_tokens", "dim", "depth", "dim_head", "heads", "ff_mult", "short_conv", "knn_attn_heads"]
)
@pytest.mark.parametrize("value", [10**6, 2**31 - 1, 10**30])
def test_a_configuration_of_more_than_the_file_holds_is_refused_before_a_model_is_made(
    size: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    config = tiny().config.to_dict() | {size: value}
    save_file(tiny().state_dict(), path, metadata={"model_config": json.dumps(config)})

    def without_memory(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        assert tensor.is_meta
        return tensor

    monkeypatch.setattr(torch.Tensor, "normal_", without_memory)  # to which every model that is made comes
    with refused("expected .*, got "):
        load_checkpoint(path)


def test_weights_that_are_no_floating_point_numbers_are_refused() -> None:
    model = tiny()
    whole = {name: tensor.long() for name, tensor in model.state_dict().items()}
    with refused("expected weights of torch.float64, .*, got .*: torch.int64"):
        load_weights(model, whole)
