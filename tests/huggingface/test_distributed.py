"""Several processes, each with a memory of its own: DistributedDataParallel and FSDP.

Run by itself, this file is one of them. To start takes longer than to run, so each goes through all the ways.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers")

from memorizing_transformers_pytorch.huggingface import AttachedMemory, attach_memory
from tests.huggingface.families import tiny
from tests.huggingface.test_attach import EVERYTHING, tokens
from tests.training.helpers import start

ROOT = Path(__file__).parents[2]
WAYS = ("ddp", "fsdp")


def with_memory() -> tuple[Any, AttachedMemory]:
    model = tiny("llama", "sdpa").requires_grad_(False)
    return model, attach_memory(model, retrieve="tokens", **EVERYTHING)


def step(model: Any, memory: AttachedMemory, rank: int, reads: bool) -> list[Tensor]:
    """The gradients of the biases, for text of this process, after a text was read or not."""
    ids = tokens(1, 30, seed=rank)
    if reads:
        memory.read(ids, progress=False)
    model(input_ids=ids[:, :9], labels=ids[:, :9]).loss.backward()
    gradients: list[Any] = [parameter.grad for parameter in memory.parameters()]
    return [each.full_tensor() if hasattr(each, "full_tensor") else each for each in gradients]


def gradients_of(way: str, rank: int) -> list[Tensor]:
    model, memory = with_memory()
    outer: Any = model
    if way == "ddp":
        outer = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for part in (*model.model.layers, model):
            dist.fsdp.fully_shard(part, mesh=mesh)
    return step(outer, memory, rank, reads=way == "fsdp" or rank == 0)


def main(folder: Path, rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # asks nobody for the name of this machine
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    found = {way: [each.tolist() for each in gradients_of(way, rank)] for way in WAYS}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # how threads of gloo and DistributedDataParallel come to an end is not ours to test: it may hang


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, by way."""
    folder = tmp_path_factory.mktemp("distributed")
    processes = [start([str(folder), str(rank)], module=__name__, cwd=ROOT) for rank in range(2)]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_means_over_processes_also_where_one_remembers_nothing(
    way: str, found: list[dict[str, Any]]
) -> None:
    """FSDP gathers weights while they are used, so there every process must read at once."""
    each = []
    for rank in range(2):
        model, memory = with_memory()
        each.append(step(model, memory, rank, reads=way == "fsdp" or rank == 0))
    expected = [(one + other) / 2 for one, other in zip(*each, strict=True)]
    for of_rank in found:
        torch.testing.assert_close([torch.tensor(gradient) for gradient in of_rank[way]], expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
