"""Lists that are learned for queries: where keys and queries lie in them, and what that is worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.index import approximate
from memorizing_transformers_pytorch.memory.index.structure import Kind, Space

DIM, TOPK = 16, 8


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("count", [1, 5, 300])
def test_inner_products_stay_as_they_are(width: int, count: int) -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(count, width), 3 * torch.randn(11, width) + 1
    space = Space(queries)
    placed, asked = space.keys(Vectors(keys)), space.queries(queries)
    assert placed.shape[1] == asked.shape[1]
    assert placed.shape[1] % 8 == 0
    assert_close(torch.from_numpy(asked @ placed.T), queries @ keys.mT, rtol=1e-4, atol=1e-4)


def test_distances_are_how_much_products_with_the_queries_differ() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(40, DIM) @ torch.randn(DIM, DIM), torch.randn(9, DIM)
    placed = torch.from_numpy(Space(queries).keys(Vectors(keys)))
    differences = keys[:, None] - keys
    of_products = (differences @ queries.mT).square().sum(dim=-1) / queries.square().mean()
    of_directions = DIM * differences.square().sum(dim=-1)  # the queries that are added
    assert_close(torch.cdist(placed, placed).square(), (of_products + of_directions) / (40 + DIM), rtol=1e-4, atol=1e-4)


def test_without_size_all_directions_count_alike() -> None:
    keys = torch.randn(5, DIM)
    assert_close(torch.from_numpy(Space(torch.zeros(3, DIM)).keys(Vectors(keys)))[:, :DIM] * 19**0.5 / 4, keys)


def test_a_key_lies_in_the_list_of_the_nearest_centroid_and_a_query_reads_those_with_the_largest_products() -> None:
    queries, keys = narrow(300, 2_000)
    lists = Kind("IVF8,Flat", DIM).trained_for(queries, Vectors(keys))
    assert lists._space is not None
    centroids = torch.from_numpy(lists.structure.quantizer.reconstruct_n(0, 8))
    placed, asked = (
        torch.from_numpy(each) for each in (lists._space.keys(Vectors(keys)), lists._space.queries(queries))
    )
    _, found = lists.structure.quantizer.search(placed.numpy(), 1)
    assert torch.equal(torch.from_numpy(found)[:, 0], torch.cdist(placed[:, :DIM], centroids[:, :DIM]).argmin(dim=1))
    _, found = lists.structure.quantizer.search(asked.numpy(), 2)
    best = (asked[:, :DIM] @ centroids[:, :DIM].mT).topk(2).indices
    assert torch.equal(torch.from_numpy(found), best)


def narrow(num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """Queries that vary along two dimensions, and keys that vary along all others twice as much."""
    random = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(num_queries, DIM, generator=random), torch.randn(num_keys, DIM, generator=random)
    queries[:, 2:] *= 0.01
    keys[:, 2:] *= 2
    return queries, keys


def memory_of(keys: Tensor, index: str) -> KNNMemory:
    memory = KNNMemory(DIM, len(keys), index=index)
    memory.add(torch.stack((keys, keys), dim=-2)[None, None])
    return memory


@pytest.mark.parametrize("index", ["IVF64,Flat", "IVF64,SQfp16", "IVF64,SQ8", "auto"])
def test_where_queries_vary_along_few_dimensions_few_lists_are_read(
    index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = narrow(400, 8_192)
    probed = []
    for many in (1.0, approximate.MANY):
        monkeypatch.setattr(approximate, "MANY", many)
        monkeypatch.setattr(approximate, "TARGET_RECALL", 0.0 if many == 1 else 0.95)
        memory = memory_of(keys, "IVF64,Flat" if index == "auto" else index)
        memory.retrieve(queries[None, :200], TOPK)
        probed.append((memory.searcher._training.probes, memory.recall(queries[None, 200:], TOPK, sample=200)))  # type: ignore[attr-defined]
    assert probed[1][0] <= 8
    assert probed[1][1] > 0.9 > probed[0][1]
    memory = memory_of(keys, index)
    memory.retrieve(queries[None, :200], TOPK)
    assert "nprobe" in memory.index_in_use
    assert "exact" not in memory.index_in_use


def test_lists_for_queries_are_kept_only_where_they_read_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = narrow(200, 8_192)
    chosen = []
    for learned_for in (queries, torch.eye(DIM)[2:]):  # these queries, and others, for which the lists are useless
        train = Kind.trained_for
        monkeypatch.setattr(Kind, "trained_for", lambda kind, _, some, own=learned_for, do=train: do(kind, own, some))
        memory = memory_of(keys, "IVF64,Flat")
        memory.retrieve(queries[None], TOPK)
        chosen.append(memory.searcher._training.templates[0]._space is not None)  # type: ignore[attr-defined]
        monkeypatch.undo()
    assert chosen == [True, False]


def test_lists_for_queries_follow_the_ring() -> None:
    queries, keys = narrow(200, 1_000)
    lists = Kind("IVF8,Flat", DIM).trained_for(queries, Vectors(keys)).filled(Vectors(keys))
    places = torch.tensor([3, 999, 500])
    lists.replace(places, Vectors(-3 * keys[places]))
    held = torch.where(torch.zeros(1_000, 1).index_fill(0, places, 1).bool(), -3 * keys, keys)
    best = (queries @ held.mT).topk(TOPK).indices
    assert torch.equal(lists.nearest(queries, TOPK, probes=8), best)
    assert lists.structure.ntotal == 1_000


def test_keys_that_move_away_are_less_near() -> None:
    queries, keys = narrow(200, 4_000)
    lists = Kind("IVF16,Flat", DIM).trained_for(queries, Vectors(keys[:2_000]))
    as_learned, alike = lists.nearness(Vectors(keys[:2_000])), lists.nearness(Vectors(keys[2_000:]))
    assert 0 < alike <= as_learned + 0.01
    moved = keys[2_000:].clone()
    moved[:, :2] += 3
    assert lists.nearness(Vectors(moved)) < 0.5 * alike
    assert lists.nearness(Vectors(moved[:1])) < 0.5 * alike  # one at a time too


def test_lists_that_hold_too_few_do_not_count_as_enough() -> None:
    """All queries look first in a list of four: what a search of all entries adds is not the merit of the lists."""
    random = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(4_000, DIM, generator=random), torch.randn(100, DIM, generator=random)
    keys[:4], queries[:, 0] = 50 * torch.eye(DIM)[0], 5.0
    memory = memory_of(keys, "IVF64,Flat")
    found = memory.retrieve(queries[None], TOPK)
    training = memory.searcher._training  # type: ignore[attr-defined]
    assert training.probes > 1
    assert training.recall >= approximate.TARGET_RECALL
    assert_close(found.scores[0, :, 0], (queries @ keys.mT).max(dim=1).values)


def test_lists_for_queries_are_tried_where_reading_more_lists_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "TRIES", 0)
    queries, keys = narrow(200, 8_192)
    memory = memory_of(keys, "IVF64,Flat")
    memory.retrieve(queries[None], TOPK)
    training = memory.searcher._training  # type: ignore[attr-defined]
    assert training.probes == 1
    assert training.recall < approximate.TARGET_RECALL
    assert training.templates[0]._space is not None


def test_each_head_has_lists_for_its_own_queries() -> None:
    queries, keys = narrow(200, 8_192)
    both = torch.stack((keys, keys.roll(5, dims=1)))
    memory = KNNMemory(DIM, len(keys), num_kv_heads=2, index="IVF64,Flat")
    memory.add(torch.stack((both, both), dim=-2)[None])
    memory.retrieve(torch.stack((queries, queries.roll(5, dims=1)))[None], TOPK)
    assert memory.searcher._training.probes <= 8  # type: ignore[attr-defined]


def test_what_is_moved_fits_into_float16_codes() -> None:
    queries = torch.randn(100, DIM) * torch.tensor([30.0] + [1.0] * (DIM - 1))
    keys = torch.full((2, DIM), 1e30)
    space = Space(queries)
    assert abs(space.keys(Vectors(keys))).max() <= 65_504
    assert abs(space.queries(keys)[:, :DIM]).max() <= 65_504
