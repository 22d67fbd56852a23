"""Codes tell what they stand for to half a scale, and everything is computed with what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor
from torch.nn.functional import normalize

from memorizing_transformers_pytorch.memory import KNNMemory, NonFiniteError
from memorizing_transformers_pytorch.memory.checks import STORAGE_DTYPES
from memorizing_transformers_pytorch.memory.entries import Vectors
from memorizing_transformers_pytorch.memory.policy import POLICIES
from memorizing_transformers_pytorch.memory.store import Sizes
from tests.reference import kept

LARGEST = torch.finfo(torch.float32).max
anything = arrays.arrays(
    "float32", arrays.array_shapes(min_dims=2, max_dims=3, max_side=9), elements=st.floats(-LARGEST, LARGEST, width=32)
)
moderate = arrays.arrays(
    "float32", arrays.array_shapes(min_dims=2, max_dims=3, max_side=9), elements=st.floats(-1e3, 1e3, width=32)
)


@settings(deadline=None)
@given(moderate)
def test_codes_are_those_of_the_slow_obvious_version(numbers: object) -> None:
    floats = torch.from_numpy(numbers)
    assert torch.equal(Vectors.of(floats, torch.int8).floats(), kept(floats, torch.int8))


@settings(deadline=None)
@given(anything)
def test_no_number_is_off_by_more_than_half_a_scale(numbers: object) -> None:
    floats = torch.from_numpy(numbers)
    vectors = Vectors.of(floats, torch.int8)
    assert vectors.scales is not None
    assert vectors.numbers.dtype == torch.int8
    assert int(vectors.numbers.abs().max()) <= 127
    largest = floats.double().abs().amax(dim=-1)
    smallest = torch.finfo(torch.float32).tiny  # below, float32 has fewer digits
    torch.testing.assert_close(vectors.scales.double(), largest / 127, rtol=1e-6, atol=smallest)
    error = (vectors.floats(torch.float64) - floats.double()).abs()
    assert bool((error <= (0.5 + 1e-4) * largest.unsqueeze(-1) / 127 + smallest).all())


@pytest.mark.parametrize("size", [1.0, LARGEST, torch.finfo(torch.float32).tiny, 1e-45])
def test_the_largest_number_stays_finite_and_of_its_size(size: float) -> None:
    found = Vectors.of(torch.tensor([[size, -size, 0.0]]), torch.int8).floats()
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, torch.tensor([[size, -size, 0.0]]), rtol=1e-5, atol=1e-38)


def test_a_vector_of_zeros_has_scale_0_and_is_kept() -> None:
    vectors = Vectors.of(torch.zeros(2, 3), torch.int8)
    assert vectors.scales is not None
    assert not vectors.scales.any()
    assert torch.equal(vectors.floats(), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_vectors_are_taken_joined_and_copied_whole(dtype: torch.dtype) -> None:
    """As the numbers that they stand for are."""
    vectors = Vectors.of(torch.randn(3, 5, 7), dtype)
    floats, places = vectors.floats(), torch.tensor([4, 0, 4])
    assert (vectors.shape, vectors.float_dtype) == (floats.shape, floats.dtype)
    assert torch.equal(vectors[1, 2:].floats(), floats[1, 2:])
    assert torch.equal(vectors[:, places].floats(), floats[:, places])
    assert torch.equal(vectors.at(places).floats(), floats[:, places])
    assert torch.equal(vectors.flatten(0, 1).floats(), floats.flatten(0, 1))
    assert torch.equal(torch.stack([each.floats() for each in vectors]), floats)
    assert torch.equal(Vectors.cat([vectors[:, :2], vectors], dim=1).floats(), torch.cat((floats[:, :2], floats), 1))
    other = vectors.clone()
    other[:, 3:].copy_(vectors[:, :2])
    assert torch.equal(other.floats(), torch.cat((floats[:, :3], floats[:, :2]), dim=1))
    assert torch.equal(vectors.floats(), floats)


@pytest.mark.parametrize("dtypes", [(torch.int8, torch.float32), (torch.float32, torch.int8)], ids=str)
def test_codes_are_not_mistaken_for_numbers(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    vectors, others = (Vectors.of(torch.randn(2, 3), dtype) for dtype in dtypes)
    before = vectors.floats().clone()
    with pytest.raises(ValueError, match=f"^expected vectors kept as {dtypes[0]}, got {dtypes[1]}$"):
        vectors.copy_(others)
    assert torch.equal(vectors.floats(), before)


# In a memory

DIM = 33


def of_codes(entries: Tensor, **options: object) -> KNNMemory:
    memory = KNNMemory(DIM, 4_096, entries.shape[0], num_kv_heads=entries.shape[1], dtype=torch.int8, **options)
    memory.add(entries)
    return memory


@pytest.mark.parametrize("index", ["exact", "auto", "IVF16,Flat", "IVF16,SQ8"])
def test_nearly_all_of_the_best_entries_are_found_by_codes(index: str) -> None:
    entries, queries = normalize(torch.randn(1, 2, 3_001, 2, DIM), dim=-1), torch.randn(1, 2, 101, DIM)
    best = (queries @ entries[..., 0, :].mT).topk(32).indices
    slots = of_codes(entries, index=index).retrieve(queries, 32).slots % 4_096
    share = (slots.unsqueeze(-1) == best.unsqueeze(-2)).any(dim=-1).float().mean()
    assert float(share) > (0.97 if index in ("exact", "auto") else 0.9)


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float64], ids=str)
def test_scores_are_those_of_what_is_kept_and_not_of_what_was_added(query_dtype: torch.dtype) -> None:
    entries, queries = torch.randn(1, 2, 101, 2, DIM), torch.randn(1, 2, 11, DIM, dtype=query_dtype)
    memory = of_codes(entries)
    found, (pairs, _) = memory.retrieve(queries, 7), memory.search(queries, 7)
    assert pairs.dtype == torch.float32
    tolerance = 1e-12 if query_dtype == torch.float64 else 1e-5
    scores = (pairs[..., 0, :].to(query_dtype) @ queries.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.scores, scores, rtol=tolerance, atol=tolerance)
    as_added = (queries @ entries[..., 0, :].to(query_dtype).mT).topk(7).values
    assert float((found.scores - as_added).abs().max()) > 1e-4


def test_the_whole_store_is_never_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memorizing_transformers_pytorch.memory.index.exact.MAX_BLOCK_ENTRIES", 50)
    largest = 0
    convert = Vectors.floats

    def noted(vectors: Vectors, dtype: torch.dtype | None = None) -> Tensor:
        nonlocal largest
        largest = max(largest, vectors.shape[-2])
        return convert(vectors, dtype)

    memory = of_codes(torch.randn(1, 1, 1_001, 2, DIM))
    monkeypatch.setattr(Vectors, "floats", noted)
    memory.search(torch.randn(1, 3, DIM), 5)
    assert largest == 50


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_but_in_padding(number: float) -> None:
    entries = torch.randn(1, 1, 3, 2, DIM)
    memory = of_codes(entries)
    before = memory.state_dict()
    entries[0, 0, 1, 1, 5] = number
    with pytest.raises(NonFiniteError, match=r"^expected .* finite in torch.float32, got NaN or infinity$"):
        memory.add(entries)
    assert all(torch.equal(part, before[name]) for name, part in memory.state_dict().items())
    memory.add(entries, torch.tensor([[True, False, True]]))
    assert memory.num_entries == (5,)
    assert all(bool(part.isfinite().all()) for part in memory.state_dict().values())


def forget(memory: KNNMemory) -> None:
    assert memory.forget([3, 4, 11]) == 15


def load(memory: KNNMemory) -> None:
    memory.load_state_dict(memory.state_dict())


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (forget, [*range(3), *range(5, 11), *range(12, 20)]),
        (load, range(20)),
        (lambda memory: memory.resize(37), range(12, 20)),
        (lambda memory: memory.resize(5_000), range(20)),
    ],
)
def test_codes_and_scales_move_together(change: Callable[[KNNMemory], object], left: Sequence[int]) -> None:
    """Entries of very different sizes, five of each document."""
    entries = torch.randn(1, 1, 100, 2, DIM) * 10 ** torch.linspace(-8, 8, 100)[:, None, None]
    memory = KNNMemory(DIM, 4_096, dtype=torch.int8)
    memory.add(entries, origins=(torch.arange(100) // 5)[None, :, None].expand(1, -1, 3))
    change(memory)
    found = memory.store.oldest(0, 100)
    expected = torch.cat([entries[0, :, 5 * n : 5 * n + 5] for n in left], dim=1)[:, -found.keys.shape[2] :]
    assert found.origins[0, :, 0].unique().tolist() == list(left)
    assert torch.equal(found.keys.floats()[0], kept(expected[..., 0, :], torch.int8))
    assert torch.equal(found.values.floats()[0], kept(expected[..., 1, :], torch.int8))


@pytest.mark.parametrize("policy", POLICIES)
def test_codes_make_room_as_numbers_do(policy: str) -> None:
    found = []
    for dtype in (torch.float32, torch.int8):
        torch.manual_seed(0)
        memory = KNNMemory(DIM, 64, dtype=dtype, policy=policy)
        for document in range(30):
            entries, origins = torch.randn(1, 7, 2, DIM), torch.full((1, 7, 3), document)
            memory.add(entries, origins=origins)
            with torch.no_grad():
                memory.look_up(entries[..., 0, :], 1)  # each finds itself, however it is kept
        stored = memory.store.oldest(0, 64)
        found.append((stored.origins, kept(stored.keys.floats(), torch.int8), kept(stored.values.floats(), torch.int8)))
    torch.testing.assert_close(*found)


def test_codes_take_little_more_than_a_quarter_of_float32() -> None:
    def pairs(dtype: torch.dtype) -> int:
        return Sizes(3, 2, 10, 64, dtype).bytes_per_entry - 3 * 8  # origins

    assert [pairs(dtype) for dtype in STORAGE_DTYPES] == [2 * 2 * 64 * 4, 2 * 2 * 64 * 2, 2 * 2 * 64 * 2, 2 * 2 * 68]


def test_a_memory_of_codes_lies_in_its_directory_with_its_scales(tmp_path: object) -> None:
    memory = of_codes(torch.randn(2, 1, 5, 2, DIM), directory=tmp_path)
    [folder] = tmp_path.iterdir()
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes["keys"] == sizes["values"] == 2 * 4_096 * DIM
    assert sizes["key_scales"] == sizes["value_scales"] == 2 * 4_096 * 4
    memory.cleanup()
