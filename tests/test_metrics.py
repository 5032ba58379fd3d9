from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation import metrics


def features(count: int, width: int, seed: int, rank: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rank or width, width))
    return rng.normal(size=(count, rank or width)) @ mixing + rng.normal(size=width)


def slow_distance(a: np.ndarray, b: np.ndarray) -> float:
    first, second = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    root = scipy.linalg.sqrtm(first @ second)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root.real))


@given(st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_distance_equals_scipys_matrix_root(width: int, seed: int) -> None:
    a, b = features(60, width, seed), features(80, width, seed + 1)
    expected = slow_distance(a, b)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_the_distance_of_a_set_from_itself_is_nothing_even_without_full_rank() -> None:
    for rank in (3, 16):
        a = features(10, 16, 0, rank)
        assert metrics.frechet_distance(a, a) < 1e-6 * np.trace(np.cov(a.T))


def test_a_shift_of_all_features_costs_its_squared_length_even_without_full_rank() -> None:
    a = features(10, 32, 0, rank=4)
    assert metrics.frechet_distance(a + 0.5, a) == pytest.approx(32 * 0.25, rel=1e-6)


def test_the_distance_is_symmetric_and_does_not_depend_on_the_axes() -> None:
    a, b = features(50, 8, 0), features(50, 8, 1)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))[0]
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a))
    assert metrics.frechet_distance(a @ turn, b @ turn) == pytest.approx(metrics.frechet_distance(a, b))


def test_the_distance_equals_torchmetrics() -> None:
    import torch

    image = pytest.importorskip("torchmetrics.image.fid")
    a, b = features(60, 8, 0), features(70, 8, 1)
    moments = (torch.from_numpy(x) for x in (a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)))
    assert float(image._compute_fid(*moments)) == pytest.approx(metrics.frechet_distance(a, b), rel=1e-6)


def test_bad_features_are_refused_with_what_was_expected() -> None:
    good = features(10, 4, 0)
    with pytest.raises(UsageError, match="one width, got \\[10, 4\\] and \\[10, 3\\]"):
        metrics.frechet_distance(good, good[:, :3])
    with pytest.raises(UsageError, match="items >= 2"):
        metrics.frechet_distance(good[:1], good)
    with pytest.raises(UsageError, match="finite"):
        metrics.frechet_distance(np.where(good == good[0, 0], np.nan, good), good)


def test_bootstrap_draws_surround_the_distance_and_narrow_with_more_items() -> None:
    reference = features(400, 6, 0)
    widths = []
    for count in (50, 400):
        a = features(400, 6, 1)[:count]
        value = metrics.frechet_distance(a, reference)
        draws = metrics.bootstrap_frechet(a, reference, num_resamples=60, seed=3)
        estimate = metrics.frechet_estimate(value, draws, count)
        assert estimate.low <= value <= estimate.high
        widths.append((estimate.high - estimate.low) / value)
    assert widths[1] < widths[0]


def test_bootstrap_interval_covers_the_spread_of_repeated_measurements() -> None:
    reference = features(2000, 4, 0)
    base = features(40 * 200, 4, 0) * 1.3
    values = [metrics.frechet_distance(part, reference) for part in np.split(base, 40)]
    draws = metrics.bootstrap_frechet(base[:200], reference, num_resamples=200, seed=0)
    assert 0.5 < draws.std() / np.std(values) < 2


def test_the_same_seed_draws_the_same_rows_so_a_set_against_itself_has_ratio_one() -> None:
    reference, a = features(100, 4, 0), features(100, 4, 1)
    value = metrics.frechet_distance(a, reference)
    draws = [metrics.bootstrap_frechet(a, reference, num_resamples=20, seed=5) for _ in range(2)]
    ratio = metrics.ratio_estimate(value, value, *draws, 100)
    assert (ratio.low, ratio.value, ratio.high) == (1, 1, 1)
    with pytest.raises(UsageError, match="positive distance"):
        metrics.ratio_estimate(1.0, 0.0, *draws, 100)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)]
)
def test_the_wilson_interval_agrees_with_published_values(hits: int, n: int, low: float, high: float) -> None:
    estimate = metrics.share([True] * hits + [False] * (n - hits))
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))
    assert estimate.count == n


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_share_lies_inside_its_interval_and_that_inside_zero_and_one(hits: list[bool]) -> None:
    estimate = metrics.share(hits)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_top_k_counts_labels_among_the_best_and_ties_against_them() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.0, 5.0, 4.0]])
    assert metrics.top_k_hits(scores, np.array([1, 0, 2]), 2).tolist() == [True, False, True]
    assert metrics.top_k_accuracy(scores, np.array([1, 0, 2]), 1).value == 0
    with pytest.raises(UsageError, match="k in 1 … 3"):
        metrics.top_k_hits(scores, np.array([0, 0, 0]), 4)


def test_recall_is_the_mean_share_of_true_ids_found() -> None:
    assert metrics.recall([["a", "b"], ["c"], ["x"]], [["a", "c"], ["c"], []]) == 0.75
    with pytest.raises(UsageError, match="found ids for 1 queries"):
        metrics.recall([], [["a"]])
    with pytest.raises(UsageError, match="at least one"):
        metrics.share([])
