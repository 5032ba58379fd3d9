"""The numbers a report is made of: Fréchet distance, accuracy, recall, and how sure each of them is.

Pure functions of arrays in float64: no model, no file, no clock. What is measured on which images is decided in
`protocols.py`. The paper reports FID (Sec. 4.2), which is this distance on the features of one particular network; a
distance on other features is never called FID here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from knn_diffusion.errors import UsageError

Features = Float[np.ndarray, "_items _width"]
"""One row a picture; counts and widths of two sets are compared by us, with an error that says what to do."""

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A measured value and its 95 % interval over `count` items."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Mean and covariance of a set of features: the Gaussian that stands for it in the Fréchet distance."""

    mean: Float[np.ndarray, "width"]
    covariance: Float[np.ndarray, "width width"]


def moments(features: Features) -> Moments:
    """Mean and unbiased covariance in float64.

    Raises: UsageError for fewer than two rows, or values that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise UsageError(f"a covariance needs [items >= 2, width] features, got {list(features.shape)}: add images")
    if not np.isfinite(features).all():
        raise UsageError("features must be finite, got inf or nan: check the network that made them")
    exact = features.astype(np.float64)
    mean = exact.mean(0)
    centred = exact - mean
    return Moments(mean=mean, covariance=centred.T @ centred / (len(exact) - 1))


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
    return _distance(first, second, float(cross))


def frechet_distance(generated: Features, reference: Features) -> float:
    """Fréchet distance of the Gaussians of two sets of features (paper, Sec. 4.2, on features of your choice).

    It is biased upwards by about 1 / count: compare only values measured with the same counts on both sides.

    Raises: UsageError when widths differ, a side has fewer than two rows, or a value is not finite.
    """
    _require_same_width(generated, reference)
    return frechet_of_moments(moments(generated), moments(reference))


def bootstrap_frechet(
    generated: Features, reference: Features, *, num_resamples: int = 100, seed: int = 0
) -> Float[np.ndarray, "resamples"]:
    """Fréchet distances of resampled `generated` sets against the fixed reference.

    Drawing with replacement repeats rows, which shifts every draw upwards; the draws are therefore centred on the
    measured distance, and their spread is the answer. The same seed draws the same rows, so two models measured on the
    same prompts can be compared draw by draw (`ratio_estimate`).
    """
    _require_same_width(generated, reference)
    fixed = moments(reference)
    root = matrix_root(fixed.covariance)
    rng = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for i in range(num_resamples):
        resampled = moments(generated[rng.integers(0, len(generated), len(generated))])
        squares = np.linalg.eigvalsh(root @ resampled.covariance @ root)
        draws[i] = _distance(resampled, fixed, float(np.sqrt(np.clip(squares, 0.0, None)).sum()))
    return np.maximum(draws - draws.mean() + frechet_of_moments(moments(generated), fixed), 0.0)


def frechet_estimate(value: float, draws: Float[np.ndarray, "resamples"], count: int) -> Estimate:
    """The distance with the interval in which 95 % of its bootstrap draws lie."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), count=count)


def ratio_estimate(
    above: float,
    below: float,
    draws_above: Float[np.ndarray, "resamples"],
    draws_below: Float[np.ndarray, "resamples"],
    count: int,
) -> Estimate:
    """The ratio of two distances, its interval from the ratios of their bootstrap draws.

    Raises: UsageError when the lower distance is zero: a ratio to nothing says nothing.
    """
    if below <= 0 or (draws_below <= 0).any():
        raise UsageError(f"a ratio needs a positive distance below the line, got {below}: use more or other images")
    return frechet_estimate(above / below, draws_above / draws_below, count)


def top_k_hits(
    scores: Float[np.ndarray, "items classes"], labels: Int[np.ndarray, "items"], k: int
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For each item: is its label among the k best-scored classes? A tie with the label counts against it.

    Raises: UsageError when k exceeds the classes or the counts differ.
    """
    if len(scores) != len(labels) or not 1 <= k <= scores.shape[1]:
        raise UsageError(
            f"expected k in 1 … {scores.shape[1]} and {len(scores)} labels, got k {k}, {len(labels)} labels"
        )
    own = np.take_along_axis(scores, labels[:, None].astype(np.int64), axis=1)
    return (scores >= own).sum(1) <= k


def share(hits: Sequence[bool] | np.ndarray) -> Estimate:
    """Share of hits with its Wilson score interval, which stays inside [0, 1] and is honest at 0 and 1.

    Raises: UsageError when there is nothing to count.
    """
    n = len(hits)
    if n == 0:
        raise UsageError("a share needs at least one item, got none: raise the number of prompts")
    p = float(np.mean(np.asarray(hits, dtype=np.float64)))
    centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
    return Estimate(value=p, low=min(max(0.0, centre - half), p), high=max(min(1.0, centre + half), p), count=n)


def top_k_accuracy(scores: Float[np.ndarray, "items classes"], labels: Int[np.ndarray, "items"], k: int) -> Estimate:
    """Share of items whose label is among the k best-scored classes."""
    return share(top_k_hits(scores, labels, k))


def recall(found: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> float:
    """Mean share of the true ids that were found, query by query; queries without true ids do not count.

    Raises: UsageError when the number of queries differs, or no query has a true id.
    """
    if len(found) != len(truth):
        raise UsageError(f"expected found ids for {len(truth)} queries, got {len(found)}: pass one list for each query")
    shares = [len(set(f) & set(t)) / len(set(t)) for f, t in zip(found, truth, strict=True) if t]
    if not shares:
        raise UsageError("recall needs at least one true id, got none: pass the exact neighbors")
    return float(np.mean(shares))


def _distance(first: Moments, second: Moments, cross: float) -> float:
    gap = first.mean - second.mean
    spread = np.trace(first.covariance) + np.trace(second.covariance)
    return max(0.0, float(gap @ gap + spread - 2 * cross))


def _require_same_width(generated: Features, reference: Features) -> None:
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        got = f"{list(generated.shape)} and {list(reference.shape)}"
        raise UsageError(
            f"expected two sets of [items, width] features of one width, got {got}: use one network for both"
        )
