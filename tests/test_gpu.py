"""On a GPU everything gives what it gives on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memorizing_transformers_pytorch import KNNMemory, KNNMemoryList, MemorizingTransformer
from memorizing_transformers_pytorch.model.generation import generate
from memorizing_transformers_pytorch.training.loop import train
from memorizing_transformers_pytorch.training.metrics import read_metrics
from memorizing_transformers_pytorch.training.presets import run_preset
from memorizing_transformers_pytorch.training.settings import from_plain, merged

pytestmark = pytest.mark.gpu

VARIANTS = [
    {},
    {"xl_max_memories": 5},
    {"short_conv": 3},
    {"combine": "gate", "num_kv_heads": 2},
    {"memorizing_layers": ()},
]


def make_model(**changes: Any) -> MemorizingTransformer:
    torch.manual_seed(0)
    fields = {"num_tokens": 31, "dim": 32, "depth": 3, "dim_head": 16, "heads": 2, "memorizing_layers": (1, 3)}
    return MemorizingTransformer(**{**fields, "max_knn_memories": 20, "num_retrieved_memories": 5, **changes})


def three_segments(model: MemorizingTransformer, memories: KNNMemoryList, tokens: torch.Tensor) -> torch.Tensor:
    """The summed losses: the ring turns between the forward passes and the backward pass."""
    total, state = torch.zeros((), device=model.device), None
    for segment in tokens.split(9, dim=1):
        result = model(segment, memories, state, labels=segment)
        loss, state = result if model.carries_state else (result, None)
        total = total + loss
    return total


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("where", ["cuda", "cpu", "memory-mapped"])
def test_losses_gradients_and_contents_are_those_of_a_cpu(variant: dict[str, Any], where: str, tmp_path: Any) -> None:
    tokens = torch.randint(1, 31, (2, 27))
    reference, model = make_model(**variant), make_model(**variant).cuda()
    expected_memories = reference.create_knn_memories(batch_size=2)
    place = {"cuda": {"device": "cuda"}, "cpu": {}, "memory-mapped": {"directory": tmp_path}}[where]
    shape = {"max_memories": 20, "num_indices": 2, "num_kv_heads": model.config.num_kv_heads}
    memories = KNNMemoryList(KNNMemory(16, **shape, **place) for _ in expected_memories)
    expected, loss = (
        three_segments(reference, expected_memories, tokens),
        three_segments(model, memories, tokens.cuda()),
    )
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss.cpu(), expected, atol=1e-4, rtol=1e-4)
    for (name, left), right in zip(model.named_parameters(), reference.parameters(), strict=True):
        if right.grad is not None:
            assert left.grad is not None, name
            torch.testing.assert_close(left.grad.cpu(), right.grad, atol=1e-3, rtol=1e-3)
    for memory, other in zip(memories, expected_memories, strict=True):
        torch.testing.assert_close(memory.store.keys.floats().cpu(), other.store.keys.floats(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_dtype", ["float32", "bfloat16", "float16", "int8"])
def test_autocast_gives_losses_close_to_float32(dtype: torch.dtype, memory_dtype: str) -> None:
    tokens, model = torch.randint(1, 31, (2, 27)).cuda(), make_model(memory_dtype=memory_dtype).cuda()
    expected = three_segments(model, model.create_knn_memories(batch_size=2), tokens)
    with torch.autocast("cuda", dtype):
        loss = three_segments(model, model.create_knn_memories(batch_size=2), tokens)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=0.2, rtol=0.05)


@pytest.mark.parametrize(("writer", "reader"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_memories_move_between_devices_with_all_they_hold(writer: str, reader: str, tmp_path: Path) -> None:
    model = make_model().to(writer)
    written = model.create_knn_memories(batch_size=2)
    three_segments(model, written, torch.randint(1, 31, (2, 27), device=writer))
    written.save(tmp_path / "memory")
    for read in (written.to(reader), KNNMemoryList.load(tmp_path / "memory", device=reader)):
        for one, other in zip(written, read, strict=True):
            assert other.device.type == reader
            for row in range(2):
                before, after = (each.store.picked(row, each.store.places_in_order(row)) for each in (one, other))
                assert all(torch.equal(table.cpu(), after[name].cpu()) for name, table in before.items())


def test_a_seeded_text_is_that_of_a_cpu() -> None:
    texts = []
    for device in ("cpu", "cuda"):
        model = make_model().to(device)
        memories = model.create_knn_memories(batch_size=2)
        generator = torch.Generator().manual_seed(0)
        prompt = [[1, 2, 3] * 10, [4]]
        texts.append(generate(model, prompt, memories, max_new_tokens=15, segment_length=9, generator=generator))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_training_run_learns_and_goes_on(precision: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for letter in "abcdefghijklmnopqrst":
        (tmp_path / "text" / letter).write_text(f"{letter}{letter.upper()}" * 60)
    steps: dict[str, Any] = {"steps": 30, "rows": 4, "segment_length": 16, "precision": precision}
    data = {"source": str(tmp_path / "text"), "tokenizer": "bytes", "cache": str(tmp_path / "cache")}
    small = {"num_tokens": 256, "dim": 32, "dim_head": 16, "heads": 2, "depth": 2, "max_knn_memories": 64}
    plain = {"model": small, "data": data, "memory": {"growth": []}, "optimizer": {"warmup_steps": 2}}
    for number in (30, 40):
        config = from_plain(merged(merged(run_preset("small"), plain), {"training": {**steps, "steps": number}}))
        train(config, tmp_path / "run", resume=number > 30)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 40
    assert losses[-1] < 0.7 * losses[0]
