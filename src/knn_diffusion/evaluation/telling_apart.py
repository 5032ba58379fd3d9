"""Can a classifier tell drawings from real pictures? Held-out accuracy, 1/2 where it cannot.

A stricter judge than any distance: it looks for whatever sets the two apart, and a single artefact that all drawings share is
enough for it. The two sides must not show the same scenes.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation.metrics import Estimate, Features, same_width, share

FOLDS = 5
PENALTIES = (0.001, 0.01, 0.1, 1.0)
"""Strengths of the quadratic penalty, per training item, to choose from."""
NEWTON_STEPS = 30
HALVINGS = 20
CONVERGED = 1e-6
BATCH = 32

Labels = Float[np.ndarray, "_items"]
"""1 for a drawing, 0 for a real picture."""
Weights = Float[np.ndarray, "_columns"]


def tell_apart(drawn: Features, real: Features, *, seed: int = 0) -> Estimate:
    """Share of items that a logistic regression puts on the right side, each judged by a fit that has not seen it.

    Five folds; within each, the penalty that does best on a fifth of the training items. The larger side is cut to the count of the
    smaller one, at random, so that guessing is right half of the time.

    Returns: the share over items of both sides, with Wilson's interval.
    Raises: UsageError when widths differ, a side has fewer than 10 items, or a value is not finite.
    """
    same_width(drawn, real, 2 * FOLDS)
    rng = np.random.default_rng(seed)
    items, labels = _mixed(drawn, real, rng)
    fold = rng.permutation(len(items)) % FOLDS
    right = np.empty(len(items), bool)
    for number in range(FOLDS):
        held_out = fold == number
        chosen = _best_penalty(items[~held_out], labels[~held_out], rng)
        right[held_out] = _right(items[~held_out], labels[~held_out], chosen, items[held_out], labels[held_out])
    return share(right)


def tell_pictures_apart(
    drawn: UInt8[np.ndarray, "_drawn _height _width _channels"],
    real: UInt8[np.ndarray, "_real _height _width _channels"],
    *,
    epochs: int = 12,
    seed: int = 0,
) -> Estimate:
    """As `tell_apart` by a small convolutional network on pixels, trained on four fifths and asked about the last one.

    It sees grain and edges that features of a larger network leave out.

    Raises: UsageError when the shapes differ or a side has fewer than 10 pictures.
    """
    if drawn.shape[1:] != real.shape[1:] or min(len(drawn), len(real)) < 2 * FOLDS:
        raise UsageError(
            f"expected two sets of at least {2 * FOLDS} pictures of one size, got {list(drawn.shape)} and "
            f"{list(real.shape)}: bring both to one size"
        )
    rng = np.random.default_rng(seed)
    items, labels = _mixed(drawn, real, rng)
    order = rng.permutation(len(items))
    held_out, training = np.split(order, [len(items) // FOLDS])
    network = _network(items.shape[-1], seed)
    _train(network, items[training], labels[training], epochs, rng)
    scores = _scores(network, items[held_out])
    return share((scores > 0) == (labels[held_out] > 0))


def _mixed(drawn: np.ndarray, real: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Labels]:
    count = min(len(drawn), len(real))
    sides = [side[rng.permutation(len(side))[:count]] for side in (drawn, real)]
    return np.concatenate(sides), np.repeat([1.0, 0.0], count)


def _best_penalty(items: Features, labels: Labels, rng: np.random.Generator) -> float:
    order = rng.permutation(len(items))
    asked, training = np.split(order, [len(items) // FOLDS])
    hits = [_right(items[training], labels[training], p, items[asked], labels[asked]).mean() for p in PENALTIES]
    best = [p for p, hit in zip(PENALTIES, hits, strict=True) if hit == max(hits)]
    return best[-1]


def _right(
    items: Features, labels: Labels, penalty: float, asked: Features, answers: Labels
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of the items asked a fit on the others puts on their right side."""
    mean, spread = items.mean(0, dtype=np.float64), items.std(0, dtype=np.float64)
    spread[spread == 0] = 1

    def standard(rows: Features) -> Features:
        return np.concatenate([(rows - mean) / spread, np.ones((len(rows), 1))], axis=1)

    weights = logistic_regression(standard(items), labels, penalty * len(items))
    return (standard(asked) @ weights > 0) == (answers > 0)


def logistic_regression(items: Features, labels: Labels, penalty: float) -> Weights:
    """Weights with the least logistic loss plus penalty / 2 times their squared length, by Newton's method."""
    weights = np.zeros(items.shape[1])
    loss = _loss(items, labels, penalty, weights)
    for _ in range(NEWTON_STEPS):
        chances = 0.5 * (1 + np.tanh(items @ weights / 2))
        slope = items.T @ (chances - labels) + penalty * weights
        curvature = (items.T * (chances * (1 - chances))) @ items
        curvature[np.diag_indices_from(curvature)] += penalty
        step = np.linalg.solve(curvature, slope)
        for _ in range(HALVINGS):
            tried = _loss(items, labels, penalty, weights - step)
            if tried <= loss:
                break
            step = step / 2
        weights, gained, loss = weights - step, loss - tried, tried
        if gained < CONVERGED * len(items):
            break
    return weights


def _loss(items: Features, labels: Labels, penalty: float, weights: Weights) -> float:
    scores = items @ weights
    return float((np.logaddexp(0, scores) - labels * scores).sum() + penalty / 2 * weights @ weights)


def _network(channels: int, seed: int) -> nn.Module:
    layers: list[nn.Module] = []
    width_in = channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for width in (24, 48, 96):
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(), nn.MaxPool2d(2)]
            width_in = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, 1))


def _train(
    network: nn.Module,
    items: UInt8[np.ndarray, "items height width channels"],
    labels: Labels,
    epochs: int,
    rng: np.random.Generator,
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        order = rng.permutation(len(items))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            pixels, answers = _pixels(items[rows]), torch.from_numpy(labels[rows]).float()
            if rng.integers(2):
                pixels = pixels.flip(3)
            loss = F.binary_cross_entropy_with_logits(network(pixels)[:, 0], answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def _scores(network: nn.Module, items: UInt8[np.ndarray, "items height width channels"]) -> Float[np.ndarray, "items"]:
    batches = [network(_pixels(items[start : start + BATCH])) for start in range(0, len(items), BATCH)]
    return torch.cat(batches)[:, 0].double().numpy()


def _pixels(items: UInt8[np.ndarray, "items height width channels"]) -> Float[Tensor, "items channels height width"]:
    return torch.from_numpy(items).permute(0, 3, 1, 2).float() / 127.5 - 1
