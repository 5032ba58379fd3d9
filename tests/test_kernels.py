from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from gaussian_features import features, like_the_judges
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation import kernels


def slow_kid(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    own = [kernel(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
    other = [kernel(b[i], b[j]) for i in range(len(b)) for j in range(len(b)) if i != j]
    return float(np.mean(own) + np.mean(other) - 2 * np.mean([kernel(x, y) for x in a for y in b]))


def slow_cmmd(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([np.exp(-((p - q) ** 2).sum() / 200) for p in x for q in y]))

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


@given(st.integers(3, 9), st.integers(3, 9), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_kid_is_the_mean_over_all_pairs_of_different_items(n: int, m: int, width: int, seed: int) -> None:
    a, b = features(n, width, seed), features(m, width, seed + 1)
    assert kernels.kid(a, b).value == pytest.approx(slow_kid(a, b), rel=1e-8, abs=1e-8)


def test_kid_equals_torchmetrics() -> None:
    import torch

    oracle = pytest.importorskip("torchmetrics.image.kid")
    a, b = features(40, 8, 0), features(40, 8, 1)
    expected = float(oracle.poly_mmd(torch.from_numpy(a), torch.from_numpy(b)))
    assert kernels.kid(a, b).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("slow", [slow_kid, slow_cmmd])
def test_the_standard_error_is_the_jackknife_over_items_of_both_sides(
    slow: Callable[[np.ndarray, np.ndarray], float],
) -> None:
    a, b = features(7, 3, 0), features(9, 3, 1) + 20
    without_a = [slow(np.delete(a, i, 0), b) for i in range(7)]
    without_b = [slow(a, np.delete(b, i, 0)) for i in range(9)]
    expected = (6 * np.var(without_a) + 8 * np.var(without_b)) ** 0.5
    found = kernels.kid(a, b) if slow is slow_kid else kernels.cmmd(a, b)
    assert found.standard_error == pytest.approx(expected, rel=1e-6)


def test_between_samples_of_one_distribution_the_error_covers_the_distance_as_often_as_it_says() -> None:
    found = [kernels.kid(like_the_judges(60, 2 * i, 16), like_the_judges(90, 2 * i + 1, 16)) for i in range(80)]
    assert np.mean([abs(one.value) < 2 * one.standard_error for one in found]) > 0.9
    assert np.mean([one.standard_error for one in found]) < 2 * np.std([one.value for one in found])


def test_kid_of_two_samples_of_one_distribution_is_within_two_standard_errors_of_nothing() -> None:
    found = kernels.kid(like_the_judges(1000, 0), like_the_judges(1000, 1))
    assert abs(found.value) < 2 * found.standard_error
    other = kernels.kid(like_the_judges(300, 0, scale=1.5), like_the_judges(300, 1))
    assert other.value > 3 * other.standard_error


def test_the_standard_error_of_kid_is_the_spread_of_repeated_measurements() -> None:
    found = [kernels.kid(like_the_judges(80, 2 * i, 6, 1.5), like_the_judges(60, 2 * i + 1, 6)) for i in range(60)]
    assert 0.7 < np.mean([one.standard_error for one in found]) / np.std([one.value for one in found]) < 1.5
    assert found[0].estimate.low < found[0].value < found[0].estimate.high


def test_cmmd_is_the_mean_over_all_pairs_on_unit_vectors() -> None:
    a, b = features(9, 4, 0), features(12, 4, 1)
    assert kernels.cmmd(a, b).value == pytest.approx(slow_cmmd(a, b), rel=1e-6)
    assert kernels.cmmd(3 * a, b).value == pytest.approx(slow_cmmd(a, b), rel=1e-6)


def test_cmmd_is_ten_times_the_squared_distance_of_the_means() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(50, 16)) + shift for shift in (0.5, 0.8))
    means = [(x / np.linalg.norm(x, axis=1, keepdims=True)).mean(0) for x in (a, b)]
    assert kernels.cmmd(a, b).value == pytest.approx(10 * ((means[0] - means[1]) ** 2).sum(), rel=0.02)


def test_kernel_distances_hold_blocks_and_never_a_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(1500, 8, 0).astype(np.float32), features(1400, 8, 1).astype(np.float32)
    whole = kernels.kid(a, b), kernels.cmmd(a, b)
    monkeypatch.setattr(kernels, "ROWS", 100)
    tracemalloc.start()
    parts = kernels.kid(a, b), kernels.cmmd(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert parts[0].value == pytest.approx(whole[0].value, rel=1e-9)
    assert parts[1].value == pytest.approx(whole[1].value, rel=1e-9)
    assert peak < 2e6, "a whole kernel matrix has 17 MB"


def test_bad_features_are_refused_with_what_was_expected() -> None:
    good = features(10, 4, 0)
    with pytest.raises(UsageError, match="one width"):
        kernels.kid(good, good[:, :3])
    with pytest.raises(UsageError, match="items >= 3"):
        kernels.kid(good[:2], good)
    with pytest.raises(UsageError, match="not zero"):
        kernels.cmmd(good, 0 * good)
