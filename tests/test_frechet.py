from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from gaussian_features import features, like_the_judges
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation import frechet, metrics


def slow_distance(a: np.ndarray, b: np.ndarray) -> float:
    first, second = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    root = scipy.linalg.sqrtm(first @ second)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root.real))


@given(st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_distance_equals_scipys_matrix_root(width: int, seed: int) -> None:
    a, b = features(60, width, seed), features(80, width, seed + 1)
    expected = slow_distance(a, b)
    assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_the_distance_of_a_set_from_itself_is_nothing_even_without_full_rank() -> None:
    for rank in (3, 16):
        a = features(10, 16, 0, rank)
        assert frechet.frechet_distance(a, a) < 1e-6 * np.trace(np.cov(a.T))


def test_a_shift_of_all_features_costs_its_squared_length_even_without_full_rank() -> None:
    a = features(10, 32, 0, rank=4)
    assert frechet.frechet_distance(a + 0.5, a) == pytest.approx(32 * 0.25, rel=1e-6)


def test_the_distance_is_symmetric_and_does_not_depend_on_the_axes() -> None:
    a, b = features(50, 8, 0), features(50, 8, 1)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))[0]
    assert frechet.frechet_distance(a, b) == pytest.approx(frechet.frechet_distance(b, a))
    assert frechet.frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet.frechet_distance(a, b))


def test_the_distance_equals_torchmetrics() -> None:
    import torch

    image = pytest.importorskip("torchmetrics.image.fid")
    a, b = features(60, 8, 0), features(70, 8, 1)
    moments = (torch.from_numpy(x) for x in (a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)))
    assert float(image._compute_fid(*moments)) == pytest.approx(frechet.frechet_distance(a, b), rel=1e-6)


def test_bad_features_are_refused_with_what_was_expected() -> None:
    good = features(10, 4, 0)
    with pytest.raises(UsageError, match="one width, got \\[10, 4\\] and \\[10, 3\\]"):
        frechet.frechet_distance(good, good[:, :3])
    with pytest.raises(UsageError, match="items >= 2"):
        frechet.frechet_distance(good[:1], good)
    with pytest.raises(UsageError, match="finite"):
        frechet.frechet_distance(np.where(good == good[0, 0], np.nan, good), good)


def test_bootstrap_draws_surround_the_distance_and_narrow_with_more_items() -> None:
    reference = features(400, 6, 0)
    widths = []
    for count in (50, 400):
        a = features(400, 6, 1)[:count]
        value = frechet.frechet_distance(a, reference)
        draws = frechet.bootstrap_frechet(a, reference, num_resamples=60, seed=3)
        estimate = metrics.bootstrap_estimate(value, draws, count)
        assert estimate.low <= value <= estimate.high
        widths.append((estimate.high - estimate.low) / value)
    assert widths[1] < widths[0]


def test_bootstrap_interval_covers_the_spread_of_repeated_measurements() -> None:
    reference = features(2000, 4, 0)
    base = features(40 * 200, 4, 0) * 1.3
    values = [frechet.frechet_distance(part, reference) for part in np.split(base, 40)]
    draws = frechet.bootstrap_frechet(base[:200], reference, num_resamples=200, seed=0)
    assert 0.5 < draws.std() / np.std(values) < 2


def test_the_same_seed_draws_the_same_rows_so_a_set_against_itself_has_ratio_one() -> None:
    reference, a = features(100, 4, 0), features(100, 4, 1)
    value = frechet.frechet_distance(a, reference)
    draws = [frechet.bootstrap_frechet(a, reference, num_resamples=20, seed=5) for _ in range(2)]
    ratio = metrics.ratio_estimate(value, value, *draws, 100)
    assert (ratio.low, ratio.value, ratio.high) == (1, 1, 1)


def test_two_samples_of_one_distribution_are_no_distance_apart_without_bias() -> None:
    first, second = like_the_judges(1000, 0), like_the_judges(1000, 1)
    assert frechet.frechet_distance(first, second) > 8, "mere bias"
    assert abs(frechet.frechet_infinity(first, second)) < 0.5


def test_the_unbiased_distance_is_that_of_the_distributions_also_with_unequal_counts() -> None:
    first, second = like_the_judges(700, 0, 64, 1.3), like_the_judges(1500, 1, 64)
    true = 0.3**2 * 175
    assert frechet.frechet_infinity(first, second) == pytest.approx(true, abs=3)
    assert frechet.frechet_distance(first[:100], second[:100]) > true + 6


def test_the_unbiased_distance_has_an_interval_over_items_that_narrows_with_more() -> None:
    widths = []
    for count in (60, 600):
        first, second = like_the_judges(count, 0, 8, 1.3), like_the_judges(count, 1, 8)
        value = frechet.frechet_infinity(first, second)
        draws = frechet.bootstrap_infinity(first, second, num_resamples=40)
        estimate = metrics.bootstrap_estimate(value, draws, count)
        assert estimate.low < value < estimate.high
        widths.append(draws.std())
    assert widths[1] < widths[0] / 2


def test_the_interval_of_the_unbiased_distance_covers_repeated_measurements() -> None:
    values = [
        frechet.frechet_infinity(like_the_judges(200, 2 * i, 6, 1.3), like_the_judges(200, 2 * i + 1, 6))
        for i in range(30)
    ]
    draws = frechet.bootstrap_infinity(like_the_judges(200, 0, 6, 1.3), like_the_judges(200, 1, 6), num_resamples=60)
    assert 0.5 < draws.std() / np.std(values) < 2


def test_moments_in_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a = features(50, 5, 0).astype(np.float32)
    monkeypatch.setattr(frechet, "ROWS", 7)
    found = frechet.moments(a)
    assert np.allclose(found.mean, a.mean(0, dtype=np.float64), rtol=1e-12)
    assert np.allclose(found.covariance, np.cov(a.T.astype(np.float64)), rtol=1e-12)


def test_too_few_items_for_a_line_are_refused() -> None:
    with pytest.raises(UsageError, match=r"items >= 10, width\] features, got \[9, 4\]: add images"):
        frechet.frechet_infinity(features(9, 4, 0), features(20, 4, 1))
