from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.spatial.distance
from gaussian_features import features
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation import manifolds


def slow_overlap(drawn: np.ndarray, real: np.ndarray, k: int, k_density: int) -> tuple[float, ...]:
    def radius(items: np.ndarray, k: int) -> np.ndarray:
        return np.sort(scipy.spatial.distance.cdist(items, items), axis=1)[:, k]  # 0 is the item itself

    apart = scipy.spatial.distance.cdist(drawn, real)
    around_real = apart <= radius(real, k)[None]
    around_drawn = apart <= radius(drawn, k)[:, None]
    wide = apart <= radius(real, k_density)[None]
    precision, recall = around_real.any(1).mean(), around_drawn.any(0).mean()
    return precision, recall, wide.sum() / len(drawn) / k_density, wide.any(0).mean()


def values(found: manifolds.Overlap) -> tuple[float, ...]:
    return found.precision.value, found.recall.value, found.density.value, found.coverage.value


@given(st.integers(6, 40), st.integers(6, 40), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_overlap_is_what_all_distances_at_once_say(n: int, m: int, width: int, seed: int) -> None:
    drawn, real = 0.7 * features(n, width, seed), features(m, width, seed)
    assert values(manifolds.overlap(drawn, real)) == pytest.approx(slow_overlap(drawn, real, 3, 5))


def test_equal_distributions_overlap_and_density_is_one() -> None:
    rng = np.random.default_rng(0)
    found = manifolds.overlap(rng.normal(size=(600, 4)), rng.normal(size=(600, 4)))
    assert found.precision.value > 0.9
    assert found.recall.value > 0.9
    assert found.density.value == pytest.approx(1, abs=0.15)
    assert found.density.low < found.density.value < found.density.high
    assert found.coverage.value == pytest.approx(1 - 1 / 2**5, abs=0.04), "the expectation of Naeem et al."


def test_drawings_of_one_mode_are_precise_and_cover_little() -> None:
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(200, 4)), rng.normal(size=(200, 4)) + 30])
    found = manifolds.overlap(rng.normal(size=(400, 4)), real)
    assert found.precision.value > 0.9
    assert found.recall.value < 0.6
    assert found.coverage.value < 0.6


def test_distances_are_held_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, real = features(1500, 8, 0).astype(np.float32), features(1400, 8, 0).astype(np.float32)
    whole = manifolds.overlap(drawn, real)
    monkeypatch.setattr(manifolds, "ROWS", 50)
    monkeypatch.setattr(manifolds, "COLUMNS", 100)
    tracemalloc.start()
    parts = manifolds.overlap(drawn, real)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values(parts) == pytest.approx(values(whole))
    assert peak < 4e6, "a matrix of all distances has 17 MB"


def test_too_few_items_for_the_neighbors_are_refused() -> None:
    with pytest.raises(UsageError, match="items >= 6"):
        manifolds.overlap(features(5, 4, 0), features(20, 4, 0))
    with pytest.raises(UsageError, match="k of at least 1"):
        manifolds.overlap(features(20, 4, 0), features(20, 4, 0), k=0)
