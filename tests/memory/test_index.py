"""Every way through the exact index finds the same entries with the same scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.checks import STORAGE_DTYPES
from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.index import exact as index
from memorizing_transformers_pytorch.memory.index.exact import Best, best_of

by_dtype = pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
HEADS, QUERIES, ENTRIES, DIM = 3, 11, 101, 7


def queries_and_keys(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Vectors]:
    return torch.randn(HEADS, QUERIES, DIM), Vectors.of(torch.randn(HEADS, ENTRIES, DIM), dtype)


def brute_force(queries: Tensor, keys: Vectors, topk: int) -> Best:
    return Best(*(queries.double() @ keys.floats(torch.float64).mT).topk(min(topk, keys.shape[1])))


def assert_same(found: Best, expected: Best, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.scores, expected.scores.to(found.scores), rtol=tolerance, atol=tolerance)
    assert torch.equal(found.places.sort().values, expected.places.sort().values)


@by_dtype
@pytest.mark.parametrize("topk", [1, 5, ENTRIES, ENTRIES + 7])
def test_the_exact_index_finds_the_largest_inner_products(dtype: torch.dtype, topk: int) -> None:
    queries, keys = queries_and_keys(dtype)
    assert_same(best_of(queries, keys, topk), brute_force(queries, keys, topk))


@by_dtype
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("topk", [1, 5, 13])
@pytest.mark.parametrize(("max_entries", "max_scores"), [(9, 2**26), (50, 2**26), (2**16, 300)])
def test_blocked_search_equals_unblocked_search(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    query_dtype: torch.dtype,
    topk: int,
    max_entries: int,
    max_scores: int,
) -> None:
    queries, keys = queries_and_keys(dtype)
    unblocked = best_of(queries.to(query_dtype), keys, topk)
    monkeypatch.setattr(index, "MAX_BLOCK_ENTRIES", max_entries)
    monkeypatch.setattr(index, "MAX_BLOCK_SCORES", max_scores)
    assert_same(best_of(queries.to(query_dtype), keys, topk), unblocked)


@pytest.mark.parametrize(("max_entries", "max_scores", "largest"), [(9, 2**26, 9), (2**16, HEADS * QUERIES * 8, 8)])
def test_no_block_is_larger_than_allowed(
    monkeypatch: pytest.MonkeyPatch, max_entries: int, max_scores: int, largest: int
) -> None:
    sizes: list[int] = []

    def recorded(queries: Tensor, keys: Tensor, topk: int) -> Best:
        sizes.append(keys.shape[1])
        return matmul(queries, keys, topk)

    matmul = index._best_by_matmul
    monkeypatch.setattr(index, "_best_by_matmul", recorded)
    monkeypatch.setattr(index, "MAX_BLOCK_ENTRIES", max_entries)
    monkeypatch.setattr(index, "MAX_BLOCK_SCORES", max_scores)
    queries, keys = queries_and_keys()
    best_of(queries.double(), keys, topk=5)
    assert max(sizes) == largest
    assert sum(sizes) == ENTRIES


@by_dtype
@pytest.mark.parametrize("topk", [1, 5, ENTRIES])
def test_faiss_equals_matrix_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, topk: int) -> None:
    queries, keys = queries_and_keys(dtype)
    by_faiss = best_of(queries, keys, topk)
    monkeypatch.setattr(index, "_best_by_faiss", index._best_by_matmul)
    assert_same(by_faiss, best_of(queries, keys, topk))


def test_autocast_does_not_shorten_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every search is one, and a model under autocast searches inside it."""
    monkeypatch.setattr(index, "_best_by_faiss", index._best_by_matmul)
    queries, keys = queries_and_keys()
    memory = KNNMemory(DIM, ENTRIES, num_kv_heads=HEADS)
    memory.add(torch.stack((keys.floats(), keys.floats()), dim=-2)[None])
    with torch.autocast("cpu", torch.bfloat16):
        found = memory.retrieve(queries[None], topk=5)
    torch.testing.assert_close(found.scores[0], brute_force(queries, keys, 5).scores.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, True), (torch.float32, False)], ids=str)
def test_scores_accumulate_in_float64_for_float64_queries_only(dtype: torch.dtype, exact: bool) -> None:
    queries = torch.tensor([[[1.0, 2.0**-40]]], dtype=dtype)
    found = best_of(queries, Vectors(torch.ones(1, 1, 2)), topk=1)
    assert found.scores.dtype == dtype
    assert (found.scores.item() == 1 + 2.0**-40) is exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_keys_accumulate_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 257 ones would make 256; in float16 257 times 300 would make infinity."""
    queries, keys = torch.tensor([[[1.0], [300.0]]]).expand(-1, -1, 257), Vectors(torch.ones(1, 1, 257, dtype=dtype))
    assert best_of(queries.to(dtype), keys, topk=1).scores.flatten().tolist() == [257, 77100]


@pytest.mark.parametrize("topk", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_that_overflow_are_found_once_each(dtype: torch.dtype, topk: int) -> None:
    """Minus infinity is worse than any other product, and better than no entry."""
    keys = torch.full((1, 301, 1), torch.finfo(dtype).max, dtype=dtype)
    keys[0, 5] = 1
    found = best_of(torch.full((1, 2, 1), -2.0, dtype=dtype), Vectors(keys), topk)
    for places, scores in zip(found.places[0].tolist(), found.scores[0].tolist(), strict=True):
        assert len(set(places)) == topk
        assert places[0] == 5
        assert scores == [-2.0] + [-torch.inf] * (topk - 1)


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float64], ids=str)
def test_searching_nothing_is_refused(query_dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="expected at least one entry to search, got 0"):
        best_of(torch.ones(HEADS, QUERIES, DIM, dtype=query_dtype), Vectors(torch.ones(HEADS, 0, DIM)), topk=1)


# On a GPU


def twin_memories(dtype: torch.dtype, kv_heads: int) -> tuple[KNNMemory, KNNMemory]:
    """The same entries, more than fit, on the CPU and on the GPU."""
    on_cpu, on_gpu = (
        KNNMemory(DIM, 53, 2, num_kv_heads=kv_heads, dtype=dtype, device=device) for device in ("cpu", "cuda")
    )
    for count in (29, 31):
        entries, mask = torch.randn(2, kv_heads, count, 2, DIM), torch.rand(2, count) < 0.9
        origins = torch.randint(0, 100, (2, count, 3))
        on_cpu.add(entries, mask, origins)
        on_gpu.add(entries.cuda(), mask.cuda(), origins.cuda())
    return on_cpu, on_gpu


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("query_device", ["cpu", "cuda"])
def test_a_memory_on_the_gpu_equals_one_on_the_cpu(dtype: torch.dtype, kv_heads: int, query_device: str) -> None:
    on_cpu, on_gpu = twin_memories(dtype, kv_heads)
    assert on_cpu.num_entries == on_gpu.num_entries
    queries = torch.randn(2, 2 * kv_heads, QUERIES, DIM)
    expected, found = on_cpu.retrieve(queries, 5), on_gpu.retrieve(queries.to(query_device), 5)
    assert {part.device.type for part in found} == {query_device}
    assert torch.equal(found.slots.cpu(), expected.slots)
    assert torch.equal(found.mask.cpu(), expected.mask)
    torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=1e-5, atol=1e-5)
    key_values, _ = on_gpu.search(queries.to(query_device), 5)
    assert torch.equal(key_values.cpu(), on_cpu.search(queries, 5)[0])
    assert torch.equal(on_gpu.origins(found.slots).cpu(), on_cpu.origins(expected.slots))


@pytest.mark.gpu
def test_autocast_changes_nothing_on_the_gpu() -> None:
    _, on_gpu = twin_memories(torch.float32, 1)
    queries = torch.randn(2, QUERIES, DIM, device="cuda")
    plain = on_gpu.retrieve(queries, 5)
    with torch.autocast("cuda", torch.bfloat16):
        cast = on_gpu.retrieve(queries, 5)
    torch.testing.assert_close(cast.scores, plain.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(cast.slots, plain.slots)


@pytest.mark.gpu
def test_a_memory_on_the_gpu_writes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    twin_memories(torch.float32, 1)
    assert list(tmp_path.iterdir()) == []
