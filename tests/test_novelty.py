from __future__ import annotations

import numpy as np
import pytest

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation import novelty

LINE = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])  # distances 5, 5, 10


def test_variety_is_the_mean_distance_of_drawings_over_that_of_real_pictures() -> None:
    found = novelty.variety([LINE / 2, LINE / 4], [LINE, LINE])
    assert found.value == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert found.low == pytest.approx(1 / 4)
    assert found.high == pytest.approx(1 / 2)
    assert found.count == 2
    assert novelty.variety([LINE], [LINE]).value == 1
    assert novelty.variety([LINE * 0], [LINE]).value == 0


def test_a_concept_whose_pictures_differ_much_weighs_more() -> None:
    assert novelty.variety([LINE, 0 * LINE], [3 * LINE, LINE]).value == pytest.approx(1 / 4)


def test_a_copy_is_nearer_to_a_neighbor_than_real_pictures_to_each_other() -> None:
    drawn = np.array([[0.0, 4.9], [0.0, 5.1], [40.0, 0.0]])
    neighbors = [np.array([[0.0, 0.0], [50.0, 0.0]])] * 3
    assert novelty.copies(drawn, neighbors, [LINE] * 3).tolist() == [True, False, False]
    assert novelty.copy_rate(drawn, neighbors, [LINE] * 3).value == pytest.approx(1 / 3)


def test_every_drawing_is_held_against_its_own_concept() -> None:
    drawn, near = np.array([[0.0, 4.9], [0.0, 4.9]]), [np.zeros((1, 2))] * 2
    assert novelty.copies(drawn, near, [LINE, LINE / 2]).tolist() == [True, False]


def test_lists_that_do_not_agree_and_lone_pictures_are_refused() -> None:
    with pytest.raises(UsageError, match="one entry a prompt in every list and at least one, got 1, 2"):
        novelty.variety([LINE], [LINE, LINE])
    with pytest.raises(UsageError, match="items >= 2"):
        novelty.variety([LINE[:1]], [LINE])
    with pytest.raises(UsageError, match="real pictures that differ"):
        novelty.variety([LINE], [0 * LINE])
    with pytest.raises(UsageError, match="at least two pictures"):
        novelty.copies(LINE, [LINE] * 3, [LINE[:1]] * 3)
