"""Each Triton kernel equals its slow twin at odd sizes. `test_interpreted` runs them where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from memorizing_transformers_pytorch import KNNAttention, KNNMemory
from memorizing_transformers_pytorch.attention import ops as attention_bags
from memorizing_transformers_pytorch.attention.ops import sampled_inner_products, weighted_sums
from memorizing_transformers_pytorch.kernels import available
from memorizing_transformers_pytorch.memory.checks import STORAGE_DTYPES
from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.index import exact
from memorizing_transformers_pytorch.memory.index.exact import _bucket_maxima, best_of

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1 (see test_interpreted)", allow_module_level=True)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@by_dtype
@pytest.mark.parametrize(
    ("bags", "size", "width"), [(1, 1, 1), (11, 5, 7), (3, 32, 64), (2, 33, 65), (0, 5, 7), (4, 0, 7)]
)
def test_sums_and_products_of_bags_equal_gathered_ones(dtype: torch.dtype, bags: int, size: int, width: int) -> None:
    from memorizing_transformers_pytorch.kernels.bags import bag_products, bag_sums

    table = torch.randn(50, width, device=DEVICE).to(dtype)
    slots = torch.randint(50, (bags, size), device=DEVICE)
    weights, vectors = torch.randn(bags, size, device=DEVICE), torch.randn(bags, width, device=DEVICE)
    gathered = table[slots].float()
    torch.testing.assert_close(bag_sums(weights, table, slots), (weights.unsqueeze(-1) * gathered).sum(dim=1))
    torch.testing.assert_close(bag_products(vectors, table, slots), (gathered @ vectors.unsqueeze(-1)).squeeze(-1))


@by_dtype
@pytest.mark.parametrize(
    ("queries", "count", "width", "buckets"), [(1, 1, 1, 1), (70, 203, 7, 80), (5, 64, 64, 64), (3, 90, 20, 128)]
)
def test_bucket_maxima_equal_those_of_all_products(
    dtype: torch.dtype, queries: int, count: int, width: int, buckets: int
) -> None:
    from memorizing_transformers_pytorch.kernels.buckets import bucket_maxima

    vectors, keys = torch.randn(queries, width, device=DEVICE), torch.randn(count, width, device=DEVICE).to(dtype)
    found = bucket_maxima(vectors, keys, buckets)
    scores = vectors @ keys.float().mT
    padded = torch.nn.functional.pad(scores, (0, -count % buckets), value=-torch.inf)
    expected = padded.view(queries, -1, buckets).amax(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@by_dtype
@pytest.mark.parametrize(("count", "topk"), [(1, 1), (7, 7), (101, 5), (333, 32)])
def test_the_search_with_kernels_equals_that_without(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int, topk: int
) -> None:
    queries, keys = torch.randn(2, 9, 8, device=DEVICE), Vectors.of(torch.randn(2, count, 8, device=DEVICE), dtype)
    assert available(keys.numbers)
    found = best_of(queries, keys, topk)
    monkeypatch.setattr(exact, "available", lambda _: False)
    monkeypatch.setattr(attention_bags, "available", lambda _: False)
    expected = best_of(queries, keys, topk)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.places.sort().values, expected.places.sort().values)


@by_dtype
def test_sums_and_products_of_a_memory_equal_those_without_kernels(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    table = torch.randn(40, 8, device=DEVICE).to(dtype)
    slots = torch.randint(40, (2, 3, 5), device=DEVICE)
    weights, vectors = torch.randn(2, 3, 5, device=DEVICE), torch.randn(2, 3, 8, device=DEVICE)
    found = weighted_sums(weights, table, slots), sampled_inner_products(vectors, table, slots)
    monkeypatch.setattr(exact, "available", lambda _: False)
    monkeypatch.setattr(attention_bags, "available", lambda _: False)
    expected = weighted_sums(weights, table, slots), sampled_inner_products(vectors, table, slots)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_a_layer_with_kernels_equals_one_without_in_outputs_and_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = KNNAttention(dim=12, heads=2, dim_head=8, num_retrieved_memories=3).to(DEVICE)
    tokens = torch.randn(2, 5, 12, device=DEVICE)
    pairs = torch.stack((normalize(torch.randn(2, 30, 8), dim=-1), torch.randn(2, 30, 8)), dim=-2)

    def run() -> list[Tensor]:
        memory = KNNMemory(8, 40, 2, dtype=dtype, device=DEVICE)
        memory.add(pairs.to(DEVICE))
        x = tokens.clone().requires_grad_()
        out, _ = layer(x, knn_memory=memory)
        return [out, *torch.autograd.grad(out.square().sum(), [x, layer.to_q.weight, layer.scale])]

    found = run()
    monkeypatch.setattr(exact, "available", lambda _: False)
    monkeypatch.setattr(attention_bags, "available", lambda _: False)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-4)  # the twin rounds weights
    torch.testing.assert_close(found, run(), rtol=tolerance, atol=tolerance)


def test_float64_codes_and_other_devices_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(available(torch.zeros(1, dtype=each, device=DEVICE)) for each in (torch.float64, torch.int8))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available(torch.zeros(1))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("buckets", [1, 7, 64])
def test_bucket_maxima_in_pytorch_are_right_at_any_size(count: int, buckets: int) -> None:
    if buckets > count:
        pytest.skip("there are never more buckets than scores")
    scores = torch.randn(2, 3, count)
    found = _bucket_maxima(scores, buckets)
    for bucket in range(buckets):
        assert torch.equal(found[..., bucket], scores[..., bucket::buckets].amax(dim=-1))
