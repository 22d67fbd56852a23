"""Evaluation: each mode differs from the others in the memory alone, whichever documents are read side by side."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.evaluation import evaluate as module
from memorizing_transformers_pytorch.evaluation.controls import CONTROLS
from memorizing_transformers_pytorch.evaluation.evaluate import evaluate, mean_loss
from memorizing_transformers_pytorch.memory import KNNMemoryList

LENGTHS = (25, 9, 40, 2, 31)


def make_model(**changes: int) -> MemorizingTransformer:
    fields = {"num_tokens": 31, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "xl_max_memories": 3, "short_conv": 3}
    return MemorizingTransformer(**(fields | changes))


@pytest.fixture
def model() -> MemorizingTransformer:
    return make_model()


def make_documents(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 31, length).astype(np.int32) for length in lengths]


@torch.no_grad()
def read_by_itself(model: MemorizingTransformer, document: np.ndarray, segment: int, size: int) -> np.ndarray:
    tokens = torch.from_numpy(document.astype(np.int64))
    memories = model.create_knn_memories(batch_size=1, max_memories=size) if size else None
    state, losses = None, []
    for start in range(0, len(tokens) - 1, segment):
        stop = min(start + segment, len(tokens) - 1)
        mask = torch.ones(1, stop - start, dtype=torch.bool)
        result = model(tokens[None, start:stop], memories, state, mask=mask)
        logits, state = result if model.carries_state else (result, None)
        losses.append(F.cross_entropy(logits[0], tokens[start + 1 : stop + 1], reduction="none"))
    return torch.cat(losses).numpy()


@pytest.mark.parametrize("controls_at", [None, 11])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("changes", [{}, {"xl_max_memories": 0, "short_conv": 0}])
def test_every_size_is_what_each_document_gives_by_itself(
    changes: dict[str, int], rows: int, controls_at: int | None
) -> None:
    model, documents = make_model(**changes), make_documents(*LENGTHS)
    sizes = (0, 5, 11, 200)
    losses = evaluate(model, documents, segment_length=7, memory_sizes=sizes, controls_at=controls_at, rows=rows)
    assert list(losses) == ["off", "5", "11", "200", *(CONTROLS if controls_at else ())]
    for size, mode in zip(sizes, losses, strict=False):
        for document, loss in zip(documents, losses[mode], strict=True):
            assert loss.dtype == np.float32
            np.testing.assert_allclose(loss, read_by_itself(model, document, 7, size), rtol=1e-5, atol=1e-5)
    assert not np.allclose(losses["5"][2], losses["11"][2])


def test_sizes_that_hold_the_whole_document_are_alike(model: MemorizingTransformer) -> None:
    documents = make_documents(*LENGTHS)
    losses = evaluate(model, documents, segment_length=7, memory_sizes=(39, 0, 50, 10**12), controls_at=10**12)
    for loss, other in zip(losses["50"], losses[str(10**12)], strict=True):
        assert np.array_equal(loss, other)
    for loss, other in zip(losses["39"], losses["50"], strict=True):
        np.testing.assert_allclose(loss, other, rtol=1e-5, atol=1e-5)


def test_controls_differ_from_the_right_memory_as_soon_as_there_is_one() -> None:
    model, documents = make_model(xl_max_memories=0), make_documents(30, 29, 28)
    losses = evaluate(model, documents, segment_length=7, memory_sizes=(0, 50), controls_at=50)
    for name in CONTROLS:
        for row in range(3):
            np.testing.assert_allclose(losses[name][row][:7], losses["50"][row][:7], rtol=1e-5, atol=1e-5)
            for mode in ("50", "off"):
                assert np.abs(losses[name][row][7:] - losses[mode][row][7:]).max() > 1e-4


def test_controls_do_not_change_what_the_right_memory_gives(model: MemorizingTransformer) -> None:
    documents = make_documents(*LENGTHS)
    options = {"segment_length": 7, "memory_sizes": (0, 20), "rows": 3}
    plain, controlled = evaluate(model, documents, **options), evaluate(model, documents, controls_at=20, **options)
    for mode in plain:
        assert all(np.array_equal(a, b) for a, b in zip(plain[mode], controlled[mode], strict=True))


def test_the_same_documents_have_the_same_memory_as_their_neighbour(model: MemorizingTransformer) -> None:
    documents = make_documents(30) * 3
    losses = evaluate(model, documents, segment_length=7, memory_sizes=(0, 50), controls_at=50, controls=["other"])
    for other, right in zip(losses["other"], losses["50"], strict=True):
        np.testing.assert_allclose(other, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("count", "rows"), [(2, 1), (3, 2), (5, 2), (5, 4), (7, 3)])
def test_a_document_is_never_alone_when_another_ones_memory_is_asked_for(count: int, rows: int) -> None:
    batches = module._batches(list(range(10, 10 + count)), rows, at_least=2)
    assert sorted(number for batch in batches for number in batch) == list(range(count))
    assert all(2 <= len(batch) <= max(rows, 3) for batch in batches)


def test_the_same_seed_gives_the_same_controls(model: MemorizingTransformer) -> None:
    def controls(seed: int) -> np.ndarray:
        losses = evaluate(
            model, make_documents(40, 40), segment_length=7, memory_sizes=(0, 50), controls_at=50, seed=seed
        )
        return np.concatenate(losses["shuffled"] + losses["random keys"])

    assert np.array_equal(controls(1), controls(1))
    assert not np.array_equal(controls(1), controls(2))


def test_random_numbers_elsewhere_and_the_model_are_left_as_they_were(model: MemorizingTransformer) -> None:
    model.train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    evaluate(model, make_documents(20, 9), segment_length=7, memory_sizes=(0, 5), controls_at=5)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert model.training
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_only_the_first_tokens_are_scored_if_wanted(model: MemorizingTransformer) -> None:
    documents = make_documents(*LENGTHS)
    options = {"segment_length": 7, "memory_sizes": (0, 6), "rows": 2}
    whole, cut = evaluate(model, documents, **options), evaluate(model, documents, max_tokens=10, **options)
    for mode in whole:
        for all_losses, first in zip(whole[mode], cut[mode], strict=True):
            assert len(first) == min(len(all_losses), 10)
            np.testing.assert_allclose(first, all_losses[:10], rtol=1e-5, atol=1e-5)


def test_documents_without_anything_to_predict_have_no_losses(model: MemorizingTransformer) -> None:
    losses = evaluate(model, make_documents(1, 9, 0), segment_length=7, memory_sizes=(0, 4))
    assert [len(loss) for loss in losses["4"]] == [0, 8, 0]
    assert mean_loss(losses["4"]) == pytest.approx(losses["4"][1].mean())


def test_memories_are_closed_also_after_a_failure(
    model: MemorizingTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[KNNMemoryList] = []
    create = model.create_knn_memories
    monkeypatch.setattr(model, "create_knn_memories", lambda **sizes: made.append(create(**sizes)) or made[-1])
    with pytest.raises(ValueError, match="expected token ids from 0 to 30, got 31 to 31"):
        evaluate(model, [np.full(9, 31)], segment_length=7, memory_sizes=(0, 4, 6))
    assert len(made) == 2
    assert all(memory.is_closed for memories in made for memory in memories)


def bad_calls() -> Iterator[tuple[dict[str, object], str]]:
    yield {"documents": make_documents(1)}, "expected documents of at least 2 tokens, got 1 shorter ones"
    yield {"documents": make_documents(9, 1), "controls_at": 4}, "expected at least 2 documents .* got 1"
    yield {"memory_sizes": ()}, r"expected distinct memory sizes of at least 0, got \[\]"
    yield {"memory_sizes": (0, 4, 4)}, r"expected distinct memory sizes of at least 0, got \[0, 4, 4\]"
    yield {"memory_sizes": (-1,)}, r"expected distinct memory sizes of at least 0, got \[-1\]"
    yield {"controls_at": 3}, r"expected controls_at among memory sizes \[0, 4\], got 3"
    yield {"controls_at": 0}, "expected controls_at among memory sizes .* got 0"
    yield {"controls": ["nonsense"]}, "expected controls among .* got"
    yield {"rows": 0}, "expected rows to be at least 1, got 0"
    yield {"max_tokens": 0}, "expected max_tokens to be at least 1, got 0"
    yield {"segment_length": 0}, "expected segment_length to be at least 1, got 0"


@pytest.mark.parametrize(("changes", "message"), list(bad_calls()))
def test_what_makes_no_sense_is_refused(model: MemorizingTransformer, changes: dict[str, object], message: str) -> None:
    options = {"documents": make_documents(9, 9), "segment_length": 7, "memory_sizes": (0, 4)} | changes
    with pytest.raises(ValueError, match=message):
        evaluate(model, **options)


def test_a_model_without_memory_has_only_memory_off() -> None:
    model = make_model(memorizing_layers=(), short_conv=0)
    assert list(evaluate(model, make_documents(9), segment_length=4, memory_sizes=(0,))) == ["off"]
    with pytest.raises(ValueError, match=r"expected only memory size 0 for a model without memory, got \[0, 4\]"):
        evaluate(model, make_documents(9), segment_length=4, memory_sizes=(0, 4))
