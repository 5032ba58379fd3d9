"""Precision, recall, density and coverage: what share of drawings looks real, and what share of the real is drawn.

A set's manifold is the union of balls around its items, each as wide as the distance to the k-th neighbor in the set. All four
figures depend on the counts: compare equal counts only. Distances are computed block by block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation.metrics import Z_95, Estimate, Features, same_width, share

ROWS = 512
"""Items whose distances to all others are in memory at a time."""
COLUMNS = 4096
"""Items turned into float64 at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """How two sets overlap; intervals are over items, for balls that stay as they are."""

    precision: Estimate
    """Share of drawings inside a ball around a real item."""
    recall: Estimate
    """Share of real items inside a ball around a drawing."""
    density: Estimate
    """Real balls that a drawing lies in, over k; 1 for equal sets, and above where drawings crowd."""
    coverage: Estimate
    """Share of real balls that hold a drawing."""


def overlap(generated: Features, reference: Features, *, k: int = 3, k_density: int = 5) -> Overlap:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Args:
        k: neighbor that a ball of precision and recall reaches to.
        k_density: the same for density and coverage.

    Raises: UsageError when widths differ, a value is not finite, or a side has no k other items.
    """
    if min(k, k_density) < 1:
        raise UsageError(f"expected neighbors k of at least 1, got {k} and {k_density}: choose 3 and 5")
    same_width(generated, reference, max(k, k_density) + 1)
    real, real_density = radii(reference, (k, k_density))
    (drawn,) = radii(generated, (k,))
    precise, density = np.zeros(len(generated), bool), np.zeros(len(generated))
    recalled, covered = np.zeros(len(reference), bool), np.zeros(len(reference), bool)
    for start in range(0, len(generated), ROWS):
        rows = slice(start, start + ROWS)
        squares = squared_distances(generated[rows], reference)
        inside = squares <= real_density
        precise[rows] = (squares <= real).any(1)
        density[rows] = inside.sum(1) / k_density
        recalled |= (squares <= drawn[rows, None]).any(0)
        covered |= inside.any(0)
    return Overlap(precision=share(precise), recall=share(recalled), density=_mean(density), coverage=share(covered))


def radii(features: Features, neighbors: tuple[int, ...]) -> list[Float[np.ndarray, "items"]]:
    """Squared distance of each item to its k-th nearest other of the set, for each k."""
    found = np.empty((len(neighbors), len(features)))
    for start in range(0, len(features), ROWS):
        squares = squared_distances(features[start : start + ROWS], features)
        items = np.arange(len(squares))
        squares[items, start + items] = np.inf
        ordered = np.partition(squares, [k - 1 for k in neighbors], axis=1)
        for number, k in enumerate(neighbors):
            found[number, start : start + ROWS] = ordered[:, k - 1]
    return list(found)


def squared_distances(first: Features, second: Features) -> Float[np.ndarray, "rows columns"]:
    """Squared Euclidean distance of every row of the first to every row of the second."""
    rows = first.astype(np.float64)
    squares = np.empty((len(first), len(second)))
    for start in range(0, len(second), COLUMNS):
        columns = second[start : start + COLUMNS].astype(np.float64)
        lengths = (rows**2).sum(1)[:, None] + (columns**2).sum(1)
        squares[:, start : start + COLUMNS] = lengths - 2 * rows @ columns.T
    return np.maximum(squares, 0.0, out=squares)


def _mean(values: Float[np.ndarray, "items"]) -> Estimate:
    mean, half = float(values.mean()), float(Z_95 * values.std(ddof=1) / len(values) ** 0.5)
    return Estimate(value=mean, low=max(0.0, mean - half), high=mean + half, count=len(values))
