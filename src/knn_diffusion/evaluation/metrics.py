"""The numbers a report is made of: shares, accuracies, recall, and how sure each of them is.

Pure functions of arrays in float64: no model, no file, no clock. Distances of sets of features are in `frechet`, `kernels` and
`manifolds`. What is measured on which images is decided in `protocols` and `comparison`.
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


def same_width(generated: Features, reference: Features, least: int = 2) -> None:
    """Check that two sets of features can be compared.

    Args: least: items that each side needs.
    Raises: UsageError when widths differ, a side has too few rows, or a value is not finite.
    """
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        got = f"{list(generated.shape)} and {list(reference.shape)}"
        raise UsageError(
            f"expected two sets of [items, width] features of one width, got {got}: use one network for both"
        )
    for features in (generated, reference):
        if len(features) < least:
            raise UsageError(f"expected [items >= {least}, width] features, got {list(features.shape)}: add images")
        if not np.isfinite(features).all():
            raise UsageError("features must be finite, got inf or nan: check the network that made them")


def bootstrap_estimate(value: float, draws: Float[np.ndarray, "resamples"], count: int) -> Estimate:
    """A measured value with the interval in which 95 % of its bootstrap draws lie."""
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
    return bootstrap_estimate(above / below, draws_above / draws_below, count)


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
