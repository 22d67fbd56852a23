"""Approximate indices find nearly what the exact one finds, and never anything that is not there.

`test_state_machine` follows them through any sequence of calls.
"""

from __future__ import annotations

import re
import time

import faiss
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.memory import KNNMemory
from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.index import approximate, auto
from memorizing_transformers_pytorch.memory.index.approximate import TARGET_RECALL, ApproximateIndex
from memorizing_transformers_pytorch.memory.index.exact import Best, Ring, inner_products
from memorizing_transformers_pytorch.memory.index.structure import Kind, Lists

DIM, CAPACITY, TOPK = 16, 4_096, 8
FACTORIES = ["IVF64,Flat", "IVF64,SQfp16", "IVF64,SQ8"]
by_factory = pytest.mark.parametrize("factory", FACTORIES)


@pytest.fixture(params=["by inner products", "for queries"])
def learned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both ways that lists are learned."""
    if request.param == "for queries":
        queries = torch.randn(50, DIM, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 1, DIM)
        monkeypatch.setattr(Kind, "trained", lambda kind, keys: kind.trained_for(queries, keys))


both_ways = pytest.mark.usefixtures("learned")


def clustered(count: int, seed: int, heads: int = 2) -> Tensor:
    """Unit vectors (heads, count, DIM) around a few directions, as keys of trained models are; others for each seed."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(64, DIM, generator=random)
    chosen = torch.randint(64, (heads, count), generator=random)
    return normalize(centres[chosen] + 0.6 * torch.randn(heads, count, DIM, generator=random), dim=-1)


def add(memory: KNNMemory, keys: Tensor) -> None:
    """keys (G, N, D) into one row; the values are the same."""
    memory.add(torch.stack((keys, keys), dim=-2)[None])


def filled(index: str, count: int = CAPACITY, seed: int = 0) -> KNNMemory:
    memory = KNNMemory(DIM, CAPACITY, num_kv_heads=2, index=index)
    for keys in clustered(count, seed).split(1_024, dim=1):  # type: ignore[no-untyped-call]
        add(memory, keys)
    return memory


def queries_like(keys: Tensor, count: int, seed: int = 5) -> Tensor:
    """Queries (1, G, count, D) near some of the keys (G, N, D)."""
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randint(keys.shape[1], (count,), generator=random)
    return normalize(keys[:, chosen] + 0.1 * torch.randn(2, count, DIM, generator=random), dim=-1)[None]


def ring_of(keys: Tensor) -> Ring:
    return Ring(Vectors(keys), row=0, cursor=0, written=keys.shape[1], epoch=1)


def test_a_memory_can_be_searched_otherwise_from_now_on() -> None:
    memory, fresh = filled("exact"), filled("IVF64,Flat")
    queries = queries_like(memory.store.keys[0].floats(), 200)
    exact = memory.retrieve(queries, TOPK)
    memory.search_with("IVF64,Flat")
    assert (memory.retrieve(queries, TOPK).slots == fresh.retrieve(queries, TOPK).slots).all()
    assert memory.index_in_use == fresh.index_in_use
    assert "index='IVF64,Flat'" in repr(memory)
    with pytest.raises(ValueError, match="no-such"):
        memory.search_with("no-such")
    assert memory.index == "IVF64,Flat"
    memory.search_with("exact")
    assert (memory.retrieve(queries, TOPK).slots == exact.slots).all()


@both_ways
@by_factory
def test_nearly_everything_is_found_while_the_ring_turns(factory: str) -> None:
    memory = filled(factory)
    for step in range(12):
        keys = clustered(512, seed=0)[:, : 200 + step]
        add(memory, keys)
        queries = queries_like(memory.store.keys[0].floats(), 200, seed=step)
        assert memory.recall(queries, TOPK, sample=200) > TARGET_RECALL - 0.1


@by_factory
def test_the_newest_entry_is_found_at_once_and_an_overwritten_one_never(factory: str) -> None:
    memory = filled(factory)
    oldest, newest = memory.store.keys[0, :, :1].floats().clone(), normalize(-clustered(1, seed=9), dim=-1)
    assert memory.retrieve(oldest[None], 1).scores.min() > 0.999
    add(memory, newest)
    assert memory.retrieve(newest[None], 1).scores.min() > 0.999
    assert memory.retrieve(oldest[None], TOPK).scores.max() < 0.999


@both_ways
@by_factory
def test_a_cleared_row_is_empty_at_once_and_finds_its_next_document_only(factory: str) -> None:
    memory = filled(factory)
    first = memory.store.keys[0].floats().clone()
    memory.retrieve(queries_like(first, 10), TOPK)
    memory.clear()
    assert not memory.retrieve(queries_like(first, 10), TOPK).mask.any()
    add(memory, -first)
    assert memory.retrieve(first[None, :, :50], TOPK).scores.max() < 0.999
    assert memory.recall(queries_like(-first, 100), TOPK, sample=100) > TARGET_RECALL - 0.1


@both_ways
def test_another_epoch_of_a_row_is_another_document_even_if_nobody_called_forget() -> None:
    index, one, other = ApproximateIndex(DIM, "IVF64,Flat"), clustered(CAPACITY, seed=0), clustered(CAPACITY, seed=1)
    index.search(ring_of(one), one[:, :50], TOPK)
    found = index.search(ring_of(other)._replace(epoch=2), other[:, :50], 1)
    assert (found.scores > 0.999).float().mean() > TARGET_RECALL - 0.05  # each finds itself


@both_ways
def test_rows_with_keys_of_different_kinds_do_not_disturb_each_other() -> None:
    memory = KNNMemory(DIM, CAPACITY, num_indices=2, num_kv_heads=2, index="IVF64,Flat")
    keys = torch.stack((clustered(CAPACITY, seed=1), clustered(CAPACITY, seed=2)))
    memory.add(torch.stack((keys, keys), dim=-2))
    queries = torch.cat([queries_like(row, 100) for row in keys])
    assert memory.recall(queries, TOPK, sample=100) >= TARGET_RECALL - 0.05
    structures = {id(head) for row in memory.searcher._rows.values() for head in row.heads}  # type: ignore[attr-defined]
    memory.retrieve(queries, TOPK)
    again = {id(head) for row in memory.searcher._rows.values() for head in row.heads}  # type: ignore[attr-defined]
    assert structures == again  # nothing was built twice


@both_ways
def test_centroids_are_learned_again_when_the_keys_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = []
    train = Kind.trained
    monkeypatch.setattr(Kind, "trained", lambda kind, keys: trainings.append(1) or train(kind, keys))
    memory = filled("IVF64,Flat")
    for step in range(10):
        add(memory, clustered(512, seed=0)[:, step : step + 400])
        memory.retrieve(queries_like(memory.store.keys[0].floats(), 50), TOPK)
    assert len(trainings) == 2  # once for each head: the same clusters come again
    for step in range(12):
        add(memory, clustered(400, seed=3 + step // 6))
        memory.retrieve(queries_like(memory.store.keys[0].floats(), 50), TOPK)
    assert 2 < len(trainings) <= 2 + 2 * 8  # at most once for a quarter of the ring
    assert memory.recall(queries_like(memory.store.keys[0].floats(), 100), TOPK, sample=100) > TARGET_RECALL - 0.1


def test_centroids_are_learned_again_when_there_are_many_more_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    trained_on = []
    train = Kind.trained
    monkeypatch.setattr(Kind, "trained", lambda kind, keys: trained_on.append(len(keys)) or train(kind, keys))
    memory = KNNMemory(DIM, 32 * 1_024, num_kv_heads=2, index="IVF16,Flat")
    for _ in range(17):
        add(memory, clustered(1_024, seed=0))
        memory.retrieve(queries_like(memory.store.keys[0, :, :1_024].floats(), 5), TOPK)
    assert sorted(set(trained_on)) == [960, 3_840, 15_360]


@both_ways
def test_keys_without_structure_do_not_seem_to_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """A centroid is nearer to the keys that it was learned from than to others like them."""
    trainings = []
    train = Kind.trained
    monkeypatch.setattr(Kind, "trained", lambda kind, keys: trainings.append(1) or train(kind, keys))
    memory = KNNMemory(DIM, CAPACITY, index="IVF64,Flat")
    for keys in normalize(torch.randn(20, 1, 1_024, DIM), dim=-1):
        add(memory, keys)
        memory.retrieve(keys[None, 0, :5], TOPK)
    assert len(trainings) == 1


def test_what_is_found_does_not_suffer_from_entries_that_were_overwritten() -> None:
    """If lists kept them, they would crowd out others: a fifth of the ring was nearer to the queries than all else."""
    random = torch.Generator().manual_seed(0)
    first, second = normalize(torch.randn(2, DIM, generator=random), dim=-1)
    near = normalize(first + 0.02 * torch.randn(CAPACITY // 5, DIM, generator=random), dim=-1)
    less = normalize(first + 0.3 * torch.randn(CAPACITY - len(near), DIM, generator=random), dim=-1)
    memory = KNNMemory(DIM, CAPACITY, index="IVF16,Flat")
    add(memory, torch.cat((near, less))[None])
    queries = normalize(first + 0.02 * torch.randn(1, 50, DIM, generator=random), dim=-1)
    memory.retrieve(queries, TOPK)
    lists = memory.searcher._rows[0].heads[0]  # type: ignore[attr-defined]
    add(memory, second.expand(1, len(near), DIM))
    assert memory.retrieve(queries, TOPK).scores.min() < 0.99  # the near ones are gone
    assert memory.recall(queries, TOPK, sample=50) > TARGET_RECALL
    assert lists is memory.searcher._rows[0].heads[0]  # type: ignore[attr-defined]  # brought up to date, not built anew
    assert lists.structure.ntotal == CAPACITY  # and nothing that was overwritten is left in them


def test_the_number_of_probes_is_measured_anew_for_more_entries_per_query_but_not_for_fewer() -> None:
    memory = filled("IVF64,Flat")
    queries = queries_like(memory.store.keys[0].floats(), 200)
    efforts = []
    for topk in (1, 64, 8, 1):
        memory.retrieve(queries, topk)
        efforts.append(memory.searcher._training.probes)  # type: ignore[attr-defined]
        assert memory.recall(queries, topk, sample=200) > TARGET_RECALL - 0.05
    assert efforts[0] < efforts[1] == efforts[2] == efforts[3]


def test_a_search_looks_no_further_than_is_worth_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of 4 bits find too little of what lies so near to each other, however many lists are probed."""
    monkeypatch.setattr(Kind, "trained_for", lambda kind, _, keys: kind.trained(keys))
    memory = KNNMemory(DIM, 16_384, index="IVF64,SQ4")
    keys = normalize(torch.ones(DIM) + 1e-3 * torch.randn(1, 16_384, DIM), dim=-1)
    keys[0, :64] = -5 * clustered(64, seed=1, heads=1)[0]  # so that the codes are coarse
    add(memory, keys)
    memory.retrieve(keys[None, 0, 64:192], TOPK)
    training = memory.searcher._training  # type: ignore[attr-defined]
    assert training.recall < TARGET_RECALL
    assert training.probes < 64


def test_structures_go_with_their_entries() -> None:
    memory = KNNMemory(DIM, CAPACITY, num_indices=3, num_kv_heads=2, index="IVF64,Flat")
    rows: dict[int, object] = memory.searcher._rows  # type: ignore[attr-defined]
    keys = clustered(CAPACITY, seed=0).expand(3, 2, CAPACITY, DIM)
    memory.add(torch.stack((keys, keys), dim=-2))
    memory.retrieve(keys[:, :, :5], TOPK)
    assert set(rows) == {0, 1, 2}
    memory.clear([1])
    assert set(rows) == {0, 2}
    memory.resize(CAPACITY - 1)
    assert not rows
    memory.retrieve(keys[:, :, :5], TOPK)
    memory.cleanup()
    assert not rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_scores_are_those_of_the_keys_in_the_store(dtype: torch.dtype, storage: torch.dtype) -> None:
    memory = KNNMemory(DIM, CAPACITY, num_kv_heads=2, dtype=storage, index="IVF64,SQ8")
    add(memory, clustered(CAPACITY, seed=0))
    queries = queries_like(memory.store.keys[0].floats(torch.float32), 40).to(dtype)
    found = memory.retrieve(queries, TOPK)
    keys = memory.store.keys.flatten(0, 2)[found.slots].floats(dtype)
    assert found.scores.dtype == dtype
    torch.testing.assert_close(found.scores, (keys @ queries.unsqueeze(-1)).squeeze(-1))
    assert (found.scores.diff(dim=-1) <= 0).all()


@both_ways
def test_keys_too_large_for_float16_codes_are_found_with_their_scores() -> None:
    memory = KNNMemory(DIM, CAPACITY, index="IVF16,SQfp16")
    keys = clustered(CAPACITY, seed=0, heads=1)
    keys[0, 7] *= 1e6
    memory.add(torch.stack((keys, keys), dim=-2)[0][None])
    found = memory.retrieve(keys[0, None, 7:8], 1)
    assert int(found.slots) == 7
    assert float(found.scores) == pytest.approx(1e12, rel=1e-4)


def test_more_are_found_than_the_probed_lists_hold() -> None:
    memory = filled("IVF64,Flat")
    found = memory.retrieve(queries_like(memory.store.keys[0].floats(), 3), CAPACITY)
    assert found.mask.all()
    assert all(len(set(slots.tolist())) == CAPACITY for slots in found.slots.flatten(0, 2))


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (101, 13)])
def test_inner_products_in_parts_equal_those_at_once(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    monkeypatch.setattr("memorizing_transformers_pytorch.memory.index.exact.MAX_GATHERED", 200)
    queries, keys = torch.randn(shape[0], DIM), torch.randn(50, DIM).to(torch.bfloat16)
    places = torch.randint(50, shape)
    expected = (queries.double() @ keys.double().mT).gather(1, places)
    torch.testing.assert_close(inner_products(queries, Vectors(keys), places).double(), expected, rtol=1e-5, atol=1e-5)


# Kinds


@pytest.mark.parametrize(
    ("factory", "lists", "fetched", "least"),
    [
        ("IVF64,Flat", 64, 1, 2_663),
        ("IVF8,SQfp16", 8, 1, 1_024),
        ("IVF8,SQbf16", 8, 1, 1_024),
        ("IVF8,SQ8", 8, 4, 1_024),
        ("IVF16777216,SQ4", 16_777_216, 4, 697_932_186),
    ],
)
def test_what_each_kind_can_do(factory: str, lists: int, fetched: int, least: int) -> None:
    kind = Kind(factory, DIM)
    assert (kind.num_lists, kind.fetched, kind.least_entries) == (lists, fetched, least)


@pytest.mark.parametrize("factory", ["IVF4,Flat", "IVF4,SQ4", "IVF4,SQ6", "IVF4,SQ8", "IVF4,SQbf16", "IVF4,SQfp16"])
def test_all_inverted_lists_serve(factory: str) -> None:
    memory = KNNMemory(DIM, 2_048, num_kv_heads=2, index=factory)
    keys = clustered(2_048, seed=0)
    add(memory, keys)
    for step in range(3):
        queries = queries_like(memory.store.keys[0].floats(), 40, seed=step)
        assert memory.retrieve(queries, TOPK).mask.all()
        assert memory.recall(queries, TOPK) > 0.8
        add(memory, keys[:, :500])
    assert "recall" in memory.index_in_use


REMOVED = ["HNSW32", "PQ8", "SQ8", "Flat", "LSH", "IVF64,PQ8", "OPQ8,IVF16,PQ8", "IVF8_HNSW8,SQ4", "IVF4,FlatDedup"]


@pytest.mark.parametrize("index", [*REMOVED, "IDMap,Flat", "", "hnsw", "IVF", "IVF0,Flat", "exact ", "IVF8,SQ8,"])
def test_all_but_inverted_lists_is_refused_with_what_is_allowed(index: str) -> None:
    allowed = r"expected index to be 'exact', 'auto' or inverted lists such as 'IVF1024,SQfp16' .*SQ8.*, got"
    with pytest.raises(ValueError, match=f"{allowed} {re.escape(repr(index))}"):
        KNNMemory(DIM, index=index)


def test_the_index_in_use_says_what_it_is_and_finds() -> None:
    memory = KNNMemory(DIM, CAPACITY, num_kv_heads=2, index="IVF64,Flat")
    assert memory.index_in_use == "IVF64,Flat (exact below 2,663 entries)"
    memory = filled("IVF64,Flat")
    memory.retrieve(queries_like(memory.store.keys[0].floats(), 100), TOPK)
    assert "IVF64,Flat, nprobe" in memory.index_in_use
    assert "index='IVF64,Flat'" in repr(memory)
    assert KNNMemory(DIM).index_in_use == "exact"


# The automatic choice


def test_large_rows_are_searched_by_lists_and_small_ones_exactly() -> None:
    keys, index = clustered(auto.THRESHOLD, seed=0), auto.AutoIndex(DIM)
    queries = queries_like(keys, 100)[0]
    assert index.description == "exact (below 8,192 entries)"
    index.search(ring_of(keys[:, :-1]), queries, TOPK)
    assert index.description == "exact (below 8,192 entries)"
    index.search(ring_of(keys), queries, TOPK)
    assert index.description.startswith("IVF128,SQfp16, nprobe")
    small = index.search(ring_of(keys[:, :100]), queries, TOPK)  # a row that has just begun
    torch.testing.assert_close(small.scores, (queries @ keys[:, :100].mT).topk(TOPK).values)


def test_a_few_queries_are_answered_exactly_where_that_is_cheaper() -> None:
    keys, index = clustered(auto.THRESHOLD, seed=0), auto.AutoIndex(DIM)
    for count, expected in ((3, "exact (below"), (4, "IVF128")):
        queries = queries_like(keys, count)[0]
        found = index.search(ring_of(keys), queries, TOPK)
        assert index.description.startswith(expected)
    exact = index.search(ring_of(keys), queries[:, :3], TOPK)  # also when there are lists
    torch.testing.assert_close(exact.scores, (queries[:, :3] @ keys.mT).topk(TOPK).values)
    assert found.scores.shape == (2, 4, TOPK)


def test_keys_without_neighbours_are_searched_exactly() -> None:
    keys, index = normalize(torch.randn(2, auto.THRESHOLD, 64), dim=-1), auto.AutoIndex(64)
    queries = normalize(torch.randn(2, 100, 64), dim=-1)
    found = index.search(ring_of(keys), queries, TOPK)
    assert index.description.startswith("exact (too many lists to probe: IVF128,SQfp16, nprobe")
    torch.testing.assert_close(found.scores, (queries @ keys.mT).topk(TOPK).values)


def test_an_index_that_finds_too_little_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "TARGET_RECALL", 1.1)
    keys, index = clustered(auto.THRESHOLD, seed=0), auto.AutoIndex(DIM)
    index.search(ring_of(keys), queries_like(keys, 100)[0], TOPK)
    assert index.description.startswith("exact (")


def test_the_choice_is_made_again_when_the_row_has_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, index = clustered(32_768, seed=0), auto.AutoIndex(DIM)
    queries, chosen = queries_like(keys, 100)[0], []
    for count, share in ((8_192, 0.0), (16_383, 1.0), (16_384, 1.0), (32_767, 0.0), (32_768, 1.0)):
        monkeypatch.setattr(auto, "LARGEST_SHARE", share)
        index.search(ring_of(keys[:, :count]), queries, TOPK)
        chosen.append(index.description.split(",")[0])
    lists = ["IVF256", "exact (too many lists to probe: IVF256", "IVF256"]
    assert chosen == ["exact (too many lists to probe: IVF128"] * 2 + lists


def test_the_choice_is_the_same_in_every_run_and_reads_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> float:
        raise AssertionError("a choice that depends on the time")

    for name in ("time", "perf_counter", "monotonic", "process_time"):
        monkeypatch.setattr(time, name, refused)
    keys = clustered(16_384, seed=0)
    runs: list[list[Best]] = []
    for _ in range(2):
        index, queries = auto.AutoIndex(DIM), queries_like(keys, 100)[0]
        runs.append([index.search(ring_of(keys[:, :count]), queries, TOPK) for count in (8_192, 12_000, 16_384)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.places, other.places)
        assert torch.equal(one.scores, other.scores)


def test_lists_are_not_too_small_to_learn_from() -> None:
    assert [auto.number_of_lists(entries) for entries in (1, 64, 1_000, 8_192, 16_383)] == [1, 1, 8, 128, 128]


@pytest.mark.parametrize("entries", [16_384, 65_536, 262_144, 1_000_000])
def test_there_are_about_twice_the_square_root_as_many_lists(entries: int) -> None:
    assert 2**0.5 * entries**0.5 <= auto.number_of_lists(entries) <= 2 * 2**0.5 * entries**0.5


# In a model


def test_a_model_searches_as_its_configuration_says() -> None:
    model = MemorizingTransformer(num_tokens=50, dim=16, dim_head=8, depth=2, memory_index="IVF4,Flat")
    with model.knn_memories_context(batch_size=2) as memories:
        assert memories[0].index == "IVF4,Flat"
        for tokens in torch.randint(1, 50, (20, 2, 64)):
            model(tokens, memories).sum().backward()
        assert "nprobe" in memories[0].index_in_use
    model = MemorizingTransformer(num_tokens=50, dim=16, dim_head=8, depth=2, memory_index="nonsense")
    with pytest.raises(ValueError, match="expected index to be"):
        model.create_knn_memories(batch_size=2)


def test_the_recall_of_an_exact_search_is_one_and_of_an_empty_memory_too() -> None:
    memory = KNNMemory(DIM, CAPACITY, num_indices=3)
    assert memory.recall(torch.randn(3, 5, DIM), TOPK) == 1.0
    memory.add(torch.randn(3, 100, 2, DIM))
    memory.clear([1])
    for shape in ((3, 5, DIM), (3, DIM), (3, 2, 200, DIM), (3, 0, DIM)):
        assert memory.recall(torch.randn(shape), TOPK) == 1.0


@pytest.mark.parametrize("probes", [1, 8])
def test_the_recall_is_the_share_of_the_best_entries_that_were_found(probes: int) -> None:
    keys = torch.randn(1, CAPACITY, DIM)
    structure = faiss.index_factory(DIM, "IVF64,Flat", faiss.METRIC_INNER_PRODUCT)
    structure.train(keys[0].numpy())
    structure.add(keys[0].numpy())
    structure.nprobe = probes
    queries = torch.randn(1, 200, DIM)
    ids = structure.search(queries[0].numpy(), TOPK)[1]
    best = (queries[0] @ keys[0].mT).topk(TOPK).indices
    expected = sum(len(set(a) & set(b)) for a, b in zip(ids.tolist(), best.tolist(), strict=True)) / best.numel()

    memory = KNNMemory(DIM, CAPACITY, index="IVF64,Flat")
    memory.add(torch.stack((keys, keys), dim=-2)[0][None])
    memory.retrieve(queries, TOPK)
    row = memory.searcher._rows[0]  # type: ignore[attr-defined]
    row.heads, row.training.probes = [Lists(structure)], probes
    assert memory.recall(queries, TOPK, sample=200) == pytest.approx(expected, abs=1e-3)
    assert expected < 1


@pytest.mark.parametrize(
    "factory", ["x" * 70_000, "IVF99999999999999999999999,Flat", "IVF1073741824,Flat", "IVF16777217,Flat"]
)
def test_structures_that_would_end_the_process_are_refused(factory: str) -> None:
    with pytest.raises(ValueError, match=r"^expected index .*\(1 to 16,777,216 lists.* got '(?s:.{1,150})$"):
        KNNMemory(8, 10, index=factory)
