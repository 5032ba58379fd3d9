"""Distances of two sets of features by kernels (maximum mean discrepancy): KID and CMMD.

KID is unbiased at any count, and tells two sets apart where a Fréchet distance is mostly bias. Kernel matrices are summed block by
block, so that 30,000 items a side need no more memory than their features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation.metrics import Z_95, Estimate, Features, same_width

ROWS = 2048
"""Rows and columns of a block of a kernel matrix."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
"""Kernel width and factor of the published CMMD (Jayasumana et al. 2024)."""

Kernel = Callable[[Float[np.ndarray, "rows columns"]], Float[np.ndarray, "rows columns"]]
"""Scalar products to values of a kernel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelDistance:
    """A squared distance and its standard error over items of both sides.

    The error is that of the jackknife, and at least what chance alone makes between two samples of one distribution, where the
    jackknife is unsteady.
    """

    value: float
    standard_error: float
    count: int

    @property
    def estimate(self) -> Estimate:
        """The value with its 95 % interval, 1.96 standard errors to each side."""
        half = Z_95 * self.standard_error
        return Estimate(value=self.value, low=self.value - half, high=self.value + half, count=self.count)


def kid(generated: Features, reference: Features) -> KernelDistance:
    """Kernel distance with (x·y / width + 1)³ (Bińkowski et al. 2018), as the U-statistic of all pairs: unbiased, maybe below 0.

    Others publish the mean over 100 random subsets of 1,000: the same in expectation, with more noise.

    Raises: UsageError when widths differ, a side has fewer than three rows, or a value is not finite.
    """
    same_width(generated, reference, 3)
    width = generated.shape[1]

    def kernel(products: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
        return (products / width + 1) ** 3

    own, other = (_sums(side, side, kernel).rows - kernel(_squares(side)[None])[0] for side in (generated, reference))
    n, m = len(generated), len(reference)
    value = own.sum() / (n * (n - 1)) + other.sum() / (m * (m - 1))
    without_own = (own.sum() - 2 * own) / ((n - 1) * (n - 2))
    without_other = (other.sum() - 2 * other) / ((m - 1) * (m - 2))
    return _distance(value, without_own, without_other, _sums(generated, reference, kernel))


def cmmd(generated: Features, reference: Features) -> KernelDistance:
    """CMMD (Jayasumana et al. 2024): 1,000 times the squared distance with a Gaussian kernel of σ = 10 on unit vectors.

    Published with CLIP ViT-L/14-336. Such a wide kernel is nearly linear: it is ten times the squared distance of the means, and sees
    neither spread nor copies. It includes each item's pair with itself, which adds about 10 (1 - |mean|²) (1 / n + 1 / m).

    Raises: UsageError when widths differ, a side has fewer than two rows, a value is not finite or a row is zero.
    """
    same_width(generated, reference)

    def kernel(cosines: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
        return CMMD_SCALE * np.exp((cosines - 1) / CMMD_SIGMA**2)

    first, second = _unit(generated), _unit(reference)
    own, other = (_sums(side, side, kernel).rows for side in (first, second))
    n, m = len(first), len(second)
    value = own.sum() / n**2 + other.sum() / m**2
    without_own = (own.sum() - 2 * own + CMMD_SCALE) / (n - 1) ** 2
    without_other = (other.sum() - 2 * other + CMMD_SCALE) / (m - 1) ** 2
    return _distance(value, without_own, without_other, _sums(first, second, kernel))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    """Sums of a kernel matrix: over each row, over each column, and of its squares."""

    rows: Float[np.ndarray, "rows"]
    columns: Float[np.ndarray, "columns"]
    squares: float


def _distance(
    within: float, without_own: Float[np.ndarray, "rows"], without_other: Float[np.ndarray, "columns"], across: _Sums
) -> KernelDistance:
    """The distance from the mean kernel within the sides, also that without each item, and the kernel across them."""
    n, m, total = len(across.rows), len(across.columns), across.rows.sum()
    values_own = without_own - 2 * (total - across.rows) / ((n - 1) * m)
    values_other = without_other - 2 * (total - across.columns) / (n * (m - 1))
    jackknife = (n - 1) * values_own.var() + (m - 1) * values_other.var()
    value = float(within - 2 * total / (n * m))
    error = max(jackknife, _variance_by_chance(across)) ** 0.5
    return KernelDistance(value=value, standard_error=float(error), count=min(n, m))


def _variance_by_chance(across: _Sums) -> float:
    """Variance between samples of one distribution: 2 (1 / n + 1 / m)² times the mean square of the centred kernel."""
    n, m = len(across.rows), len(across.columns)
    mean = across.rows.sum() / (n * m)
    rows, columns = (across.rows / m - mean) ** 2, (across.columns / n - mean) ** 2
    centred = across.squares / (n * m) - mean**2 - rows.mean() - columns.mean()
    return float(2 * (1 / n + 1 / m) ** 2 * max(0.0, centred))


def _sums(first: Features, second: Features, kernel: Kernel) -> _Sums:
    """Sums of the kernel matrix of two sets, made block by block."""
    rows, columns, squares = np.zeros(len(first)), np.zeros(len(second)), 0.0
    for i in range(0, len(first), ROWS):
        block = first[i : i + ROWS].astype(np.float64)
        for j in range(0, len(second), ROWS):
            values = kernel(block @ second[j : j + ROWS].astype(np.float64).T)
            rows[i : i + ROWS] += values.sum(1)
            columns[j : j + ROWS] += values.sum(0)
            squares += float((values**2).sum())
    return _Sums(rows=rows, columns=columns, squares=squares)


def _squares(features: Features) -> Float[np.ndarray, "rows"]:
    return np.einsum("ij,ij->i", features, features, dtype=np.float64)


def _unit(features: Features) -> Features:
    lengths = np.sqrt(_squares(features))
    if not lengths.all():
        raise UsageError("expected features that are not zero, got an item of zeros: check the network that made them")
    return features / lengths[:, None]
