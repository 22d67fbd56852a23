"""The bootstrap over documents, against the slow, obvious one and where theory knows the answer."""

from __future__ import annotations

import numpy as np
import pytest

from memorizing_transformers_pytorch.evaluation import summary
from memorizing_transformers_pytorch.evaluation.summary import drawn_means, interval


def test_a_draw_is_the_mean_over_all_tokens_of_documents_drawn_with_replacement() -> None:
    sums, counts = np.array([[3.0, 20.0]]), np.array([1, 10])
    means = drawn_means(sums, counts, draws=4_000)
    assert means is not None
    values, times = np.unique(means[0].round(9), return_counts=True)
    np.testing.assert_allclose(values, [2, 23 / 11, 3])
    np.testing.assert_allclose(times / 4_000, [0.25, 0.5, 0.25], atol=0.03)


def test_the_interval_of_equal_documents_is_that_of_the_standard_error() -> None:
    losses = np.random.default_rng(0).normal(3, 0.5, 400)
    found = interval(drawn_means(losses[None], np.ones(400, dtype=int)).squeeze())
    expected = 1.96 * losses.std() / 20
    np.testing.assert_allclose([found.low, found.high], [losses.mean() - expected, losses.mean() + expected], atol=5e-3)


def test_modes_are_averaged_over_the_same_documents() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(1, 50, 13)
    sums = random.normal(3, 1, 13) * counts
    off, on = drawn_means(np.stack((sums, sums - 0.1 * counts)), counts, draws=500)
    np.testing.assert_allclose(off - on, 0.1)
    assert off.std() > 0.05


def test_the_same_seed_gives_the_same_draws_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = np.random.default_rng(0).random((2, 7)), np.full(7, 3)
    whole = drawn_means(sums, counts, draws=50, seed=1)
    assert np.array_equal(whole, drawn_means(sums, counts, draws=50, seed=1))
    assert not np.array_equal(whole, drawn_means(sums, counts, draws=50, seed=2))
    monkeypatch.setattr(summary, "MAX_BLOCK_NUMBERS", 30)
    np.testing.assert_allclose(drawn_means(sums, counts, draws=50, seed=1), whole)


def test_one_document_says_nothing_about_others() -> None:
    assert interval(drawn_means(np.array([[3.0]]), np.array([2]))) is None


@pytest.mark.parametrize(
    ("sums", "counts", "draws", "message"),
    [
        (np.ones((2, 3)), np.ones(2), 9, r"expected sums .* got \(2, 3\), \(2,\)"),
        (np.ones(3), np.ones(3), 9, "expected sums"),
        (np.ones((2, 3)), np.array([1, 0, 2]), 9, r"at least 1 token each, got \[1, 0, 2\]"),
        (np.ones((2, 0)), np.ones(0), 9, "at least 1 token each"),
        (np.ones((2, 3)), np.ones(3), 0, "at least 1 draw, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(sums: np.ndarray, counts: np.ndarray, draws: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn_means(sums, counts, draws=draws)
