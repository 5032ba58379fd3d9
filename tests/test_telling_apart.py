from __future__ import annotations

import numpy as np
import pytest
import torch

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation import telling_apart


def test_what_is_alike_cannot_be_told_apart() -> None:
    rng = np.random.default_rng(0)
    found = telling_apart.tell_apart(rng.normal(size=(300, 20)), rng.normal(size=(300, 20)))
    assert found.low < 0.5 < found.high
    assert found.count == 600


def test_two_gaussians_are_told_apart_as_often_as_theory_says() -> None:
    rng = np.random.default_rng(0)
    shift = np.zeros(10)
    shift[0] = 2.0  # the best border is right with probability Φ(1) = 0.841
    found = telling_apart.tell_apart(rng.normal(size=(500, 10)) + shift, rng.normal(size=(500, 10)))
    assert found.value == pytest.approx(0.841, abs=0.03)


def test_features_wider_than_the_items_are_many_do_not_lead_to_chance_alone() -> None:
    rng = np.random.default_rng(0)
    drawn, real = rng.normal(size=(60, 200)), rng.normal(size=(60, 200))
    drawn[:, 0] += 6
    assert telling_apart.tell_apart(drawn, real).low > 0.5


def test_the_larger_side_is_cut_so_that_guessing_does_not_pay() -> None:
    rng = np.random.default_rng(0)
    found = telling_apart.tell_apart(rng.normal(size=(400, 5)), rng.normal(size=(50, 5)))
    assert found.count == 100
    assert found.value < 0.7


def test_the_regression_stands_where_the_slope_of_its_loss_is_nothing() -> None:
    rng = np.random.default_rng(0)
    items = rng.normal(size=(40, 3)) * 5
    labels = (items[:, 0] > 0).astype(float)  # separable: only the penalty holds the weights
    weights = telling_apart.logistic_regression(items, labels, 0.1)
    x = torch.tensor(weights, requires_grad=True)
    scores = torch.from_numpy(items) @ x
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.from_numpy(labels), reduction="sum")
    (loss + 0.05 * (x * x).sum()).backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 0.02


def test_a_small_network_finds_grain_that_means_do_not_show() -> None:
    rng = np.random.default_rng(0)
    flat = np.repeat(np.repeat(rng.integers(60, 190, (60, 4, 4, 3)), 4, 1), 4, 2).astype(np.uint8)
    grain = flat + (16 * (np.indices((16, 16)).sum(0) % 2))[None, :, :, None].astype(np.uint8)
    before = torch.random.get_rng_state()
    assert telling_apart.tell_pictures_apart(grain, flat[::-1], epochs=40).value > 0.9
    assert torch.equal(torch.random.get_rng_state(), before)
    others = np.repeat(np.repeat(rng.integers(60, 190, (60, 4, 4, 3)), 4, 1), 4, 2).astype(np.uint8)
    assert telling_apart.tell_pictures_apart(flat, others, epochs=1).value < 0.8


def test_sides_that_cannot_be_compared_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="items >= 10"):
        telling_apart.tell_apart(rng.normal(size=(9, 2)), rng.normal(size=(20, 2)))
    with pytest.raises(UsageError, match="pictures of one size"):
        telling_apart.tell_pictures_apart(np.zeros((20, 8, 8, 3), np.uint8), np.zeros((20, 9, 9, 3), np.uint8))
