"""Models with a memory, and their memories, are copied and pickled: a copy has a memory and a handle of its own."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory, memory_of
from tests.huggingface.families import tiny

IDS = torch.randint(1, 99, (1, 40), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, dict[str, Any]] = {
    "own layers": {"layers": [0, 1], "recent": 16},
    "window": {"layers": [1], "write": "window", "window": 8},
}


def attached(options: dict[str, Any]) -> AttachedMemory:
    memory = attach_memory(tiny("llama", "sdpa"), retrieve="tokens", skip_first=0, **options)
    memory.read(IDS, progress=False)
    return memory


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS[:, :9]).logits
    return found


def saved_and_loaded(memory: AttachedMemory) -> AttachedMemory:
    file = io.BytesIO()
    torch.save(memory.model, file)
    file.seek(0)
    return memory_of(torch.load(file, weights_only=False))


COPIES: dict[str, Callable[[AttachedMemory], AttachedMemory]] = {
    "deepcopy of the memory": copy.deepcopy,
    "deepcopy of the model": lambda memory: memory_of(copy.deepcopy(memory.model)),
    "pickle of the memory": lambda memory: pickle.loads(pickle.dumps(memory)),
    "pickle of the model": lambda memory: memory_of(pickle.loads(pickle.dumps(memory.model))),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_answers_the_same_and_is_independent(
    copied: Callable[[AttachedMemory], AttachedMemory], options: dict[str, Any]
) -> None:
    memory = attached(options)
    expected = logits(memory.model)
    twin = copied(memory)
    assert memory_of(twin.model) is twin
    assert memory_of(memory.model) is memory
    assert twin.model is not memory.model
    assert torch.equal(logits(twin.model), expected)
    twin.read(IDS, progress=False)
    assert [len(each.documents()) for each in (memory, twin)] == [1, 2]
    twin.clear()
    with twin.enabled(False):
        assert torch.equal(logits(memory.model), expected)
    with torch.no_grad():
        twin.model.model.embed_tokens.weight.add_(1)
    memory.read(IDS, progress=False)
    assert memory.num_bytes > 0
    memory.detach()
    twin.read(IDS, progress=False)
    twin.detach()
    with pytest.raises(ValueError, match="no memory is attached to this LlamaForCausalLM"):
        memory_of(twin.model)


def test_copies_of_a_part_of_a_model_share_its_memory() -> None:
    """PEFT copies modules that it will save."""
    memory = attached(OPTIONS["own layers"])
    part = copy.deepcopy(memory.model.model.layers[1].self_attn)
    assert part._memorizing[0] is memory.layers[1]


def test_a_copy_notices_weights_that_changed_before() -> None:
    memory = attached(OPTIONS["own layers"])
    twin = copy.deepcopy(memory)
    with torch.no_grad():
        twin.model.model.embed_tokens.weight.add_(1)
    with pytest.warns(UserWarning, match="model weights changed after this memory was written"):
        logits(twin.model)
    logits(memory.model)


def answer(pickled: bytes, channel: Connection) -> None:
    channel.send(logits(pickle.loads(pickled)).tolist())


@pytest.mark.slow
def test_a_model_goes_to_a_process_that_is_spawned() -> None:
    memory = attached(OPTIONS["own layers"])
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(pickle.dumps(memory.model), there))
    process.start()
    assert here.poll(120)
    torch.testing.assert_close(torch.tensor(here.recv()), logits(memory.model))
    process.join()
