"""Fréchet distance of two sets of features, as it is usually taken, and without the bias of few items (FD∞).

The paper reports FID (Sec. 4.2), which is this distance on the features of one particular network, of 30,000 images; a distance on
other features is never called FID here. Features are read in blocks, so that 30,000 rows of 2,048 are never copied whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from knn_diffusion.evaluation.metrics import Features, same_width

ROWS = 2048
"""Rows turned into float64 at a time."""
LEAST = 10
"""Items a side needs for a line through distances of fewer and fewer."""
SIZES = 5
"""Sizes that FD∞ fits its line through, evenly spaced in 1 / size."""

Rows = Int[np.ndarray, "_chosen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Mean and covariance of a set of features: the Gaussian that stands for it in the Fréchet distance."""

    mean: Float[np.ndarray, "width"]
    covariance: Float[np.ndarray, "width width"]


def moments(features: Features, rows: Rows | None = None) -> Moments:
    """Mean and unbiased covariance in float64, of some rows or of all.

    Raises: UsageError for fewer than two rows, or values that are not finite.
    """
    same_width(features, features)
    return _moments(features, np.arange(len(features)) if rows is None else rows)


def matrix_root(covariance: Float[np.ndarray, "width width"]) -> Float[np.ndarray, "width width"]:
    """The symmetric root of a positive semi-definite matrix; negative eigenvalues, mere rounding, count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def frechet_of_moments(first: Moments, second: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians.

    |m_1 - m_2|² + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^½). The last trace is the sum of singular values of C_1^½ C_2^½, which
    stays real and stable when a covariance has no full rank, where a general matrix root does not.
    """
    cross = np.linalg.svd(matrix_root(first.covariance) @ matrix_root(second.covariance), compute_uv=False).sum()
    return max(0.0, _distance(first, second, float(cross)))


def frechet_distance(generated: Features, reference: Features) -> float:
    """Fréchet distance of the Gaussians of two sets of features (paper, Sec. 4.2, on features of your choice).

    It is biased upwards by about a / count, and `a` differs from model to model: it is less where the reference shows what the
    drawings were asked for. So equal counts alone do not make two figures comparable; `frechet_infinity` is without that bias.

    Raises: UsageError when widths differ, a side has fewer than two rows, or a value is not finite.
    """
    same_width(generated, reference)
    return frechet_of_moments(moments(generated), moments(reference))


def frechet_infinity(generated: Features, reference: Features, *, seed: int = 0, repeats: int = 2) -> float:
    """FD∞: the Fréchet distance that endless sets would have (Chong and Forsyth 2020, arXiv 1911.07023).

    Distances of ever smaller parts of *both* sides lie on a line in 1 / size, which is read at 0. Between two samples of one
    distribution it is about 0, and may be below. The reference must not show the very scenes that were drawn: it would share
    their sampling error. With fewer items than `fit_items(width)` the line bends, and the value is a rough one.

    Differs from the paper: both sides shrink together, since the reference's own bias stays otherwise; and a size's distance is
    the mean over disjoint parts.

    Args:
        seed: of the parts.
        repeats: divisions into parts at every size.

    Raises: UsageError as `frechet_distance`, and for fewer than 10 items on a side.
    """
    same_width(generated, reference, LEAST)
    rows = np.arange(len(generated)), np.arange(len(reference))
    return _infinity(generated, reference, *rows, np.random.default_rng(seed), repeats)


def fit_items(width: int) -> int:
    """Items a side needs for a straight line under FD∞: the smallest parts then have as many items as features are wide."""
    return 3 * width // 2


def bootstrap_frechet(
    generated: Features, reference: Features, *, num_resamples: int = 100, seed: int = 0
) -> Float[np.ndarray, "resamples"]:
    """Fréchet distances of resampled `generated` sets against the fixed reference.

    Drawing with replacement repeats rows, which shifts every draw upwards; the draws are therefore centred on the
    measured distance, and their spread is the answer. The same seed draws the same rows, so two models measured on the
    same prompts can be compared draw by draw (`ratio_estimate`).
    """
    same_width(generated, reference)
    fixed = _moments(reference, np.arange(len(reference)))
    root = matrix_root(fixed.covariance)
    rng = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for i in range(num_resamples):
        resampled = _moments(generated, rng.integers(0, len(generated), len(generated)))
        draws[i] = _distance(resampled, fixed, _cross(root, resampled.covariance))
    return np.maximum(draws - draws.mean() + frechet_of_moments(moments(generated), fixed), 0.0)


def bootstrap_infinity(
    generated: Features, reference: Features, *, num_resamples: int = 100, seed: int = 0
) -> Float[np.ndarray, "resamples"]:
    """FD∞ of resampled items of both sides, the line fitted each time; centred on the measured value as in `bootstrap_frechet`.

    Raises: UsageError as `frechet_infinity`.
    """
    value = frechet_infinity(generated, reference, seed=seed)
    rng = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for i in range(num_resamples):
        own, other = (rng.integers(0, len(side), len(side)) for side in (generated, reference))
        draws[i] = _infinity(generated, reference, own, other, rng, repeats=1)
    return draws - draws.mean() + value


def _infinity(
    generated: Features, reference: Features, own: Rows, other: Rows, rng: np.random.Generator, repeats: int
) -> float:
    """The intercept of the line through mean distances of parts that are 1 / `shrunk` of both sides."""
    most = float(np.clip(min(len(own), len(other)) / generated.shape[1], 1.5, 2.5))
    shrunk = np.linspace(1.0, most, SIZES)
    distances = [_part_distance(generated, reference, own, other, rng, 1 if s == 1 else repeats, s) for s in shrunk]
    return float(np.polyfit(shrunk, distances, 1)[1])


def _part_distance(
    generated: Features,
    reference: Features,
    own: Rows,
    other: Rows,
    rng: np.random.Generator,
    repeats: int,
    shrunk: float,
) -> float:
    """Mean distance over the disjoint pairs of parts that fit into both sides."""
    found = []
    sizes = max(2, int(len(own) / shrunk)), max(2, int(len(other) / shrunk))
    for _ in range(repeats):
        shuffled = rng.permutation(own), rng.permutation(other)
        for part in range(int(shrunk)):
            first, second = (
                _moments(features, rows[part * size : (part + 1) * size])
                for features, rows, size in zip((generated, reference), shuffled, sizes, strict=True)
            )
            found.append(_distance(first, second, _cross(matrix_root(first.covariance), second.covariance)))
    return float(np.mean(found))


def _moments(features: Features, rows: Rows) -> Moments:
    blocks = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    total = np.zeros(features.shape[1])
    for block in blocks:
        total += features[block].sum(0, dtype=np.float64)
    mean = total / len(rows)
    products = np.zeros((len(mean), len(mean)))
    for block in blocks:
        centred = features[block] - mean
        products += centred.T @ centred
    return Moments(mean=mean, covariance=products / (len(rows) - 1))


def _cross(root: Float[np.ndarray, "width width"], covariance: Float[np.ndarray, "width width"]) -> float:
    """tr((C_1 C_2)^½) from the root of the first: faster than by singular values, less exact without full rank."""
    squares = np.linalg.eigvalsh(root @ covariance @ root)
    return float(np.sqrt(np.clip(squares, 0.0, None)).sum())


def _distance(first: Moments, second: Moments, cross: float) -> float:
    gap = first.mean - second.mean
    spread = np.trace(first.covariance) + np.trace(second.covariance)
    return float(gap @ gap + spread - 2 * cross)
