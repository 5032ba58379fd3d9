from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation import metrics


def test_a_ratio_takes_its_interval_from_the_ratios_of_draws_and_needs_something_below_the_line() -> None:
    draws = np.linspace(1, 2, 101)
    ratio = metrics.ratio_estimate(3.0, 1.5, 2 * draws, draws, 100)
    assert (ratio.low, ratio.value, ratio.high) == (2, 2, 2)
    with pytest.raises(UsageError, match="positive distance"):
        metrics.ratio_estimate(1.0, 0.0, draws, draws, 100)


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
