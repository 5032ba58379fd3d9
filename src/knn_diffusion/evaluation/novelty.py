"""Do drawings of a prompt differ from each other, and from the pictures that were retrieved for them?

Both questions are put in units of how real pictures of the concept differ: in distances between features, or between pixels laid
out in rows. Features must not be of the network that retrieves, or the answer is a circle.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation.manifolds import squared_distances
from knn_diffusion.evaluation.metrics import Estimate, Features, bootstrap_estimate, same_width, share


def variety(drawn: Sequence[Features], real: Sequence[Features], *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Mean distance between drawings of one prompt, over that between real pictures of what it asks for.

    1 where drawings differ as real pictures do, 0 where all drawings of a prompt are the same.

    Args:
        drawn: for each prompt the features of its drawings, at least two.
        real: for each prompt those of real pictures of its concept, at least two.

    Returns: the ratio of the means over prompts, with a bootstrap interval over prompts.
    Raises: UsageError when the numbers of prompts differ, one has too few pictures, or all real pictures are alike.
    """
    _same_count(len(drawn), len(real))
    pairs = np.array([_mean_distances(own, other) for own, other in zip(drawn, real, strict=True)])
    rows = np.random.default_rng(seed).integers(0, len(pairs), (resamples, len(pairs)))
    sums = np.concatenate([pairs.sum(0)[None], pairs[rows].sum(1)])
    if not sums[:, 1].all():
        raise UsageError("expected real pictures that differ, got only equal ones: use more pictures of each concept")
    ratios = sums[:, 0] / sums[:, 1]
    return bootstrap_estimate(float(ratios[0]), ratios[1:], len(pairs))


def copies(
    drawn: Features, neighbors: Sequence[Features], real: Sequence[Features]
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For each drawing: is it nearer to one of its neighbors than any real picture of the concept is to another?

    Args:
        drawn: one row a drawing.
        neighbors: for each drawing the features of the pictures it was drawn from.
        real: for each drawing those of real pictures of its concept, at least two, no two of them copies of each other.

    Raises: UsageError when the counts differ, or a concept has too few pictures.
    """
    _same_count(len(drawn), len(neighbors), len(real))
    answers = []
    for one, near, others in zip(drawn, neighbors, real, strict=True):
        same_width(near, others, 1)
        answers.append(squared_distances(one[None], near).min() < _between(others).min())
    return np.array(answers, dtype=bool)


def copy_rate(drawn: Features, neighbors: Sequence[Features], real: Sequence[Features]) -> Estimate:
    """Share of drawings that are copies of a neighbor, as `copies` says; arguments and errors as there."""
    return share(copies(drawn, neighbors, real))


def _mean_distances(drawn: Features, real: Features) -> tuple[float, float]:
    same_width(drawn, real)
    return float(np.sqrt(_between(drawn)).mean()), float(np.sqrt(_between(real)).mean())


def _between(features: Features) -> Float[np.ndarray, "pairs"]:
    """Squared distances of all pairs within a set."""
    if len(features) < 2:
        raise UsageError(f"expected at least two pictures of each concept and prompt, got {len(features)}: add some")
    return squared_distances(features, features)[np.triu_indices(len(features), 1)]


def _same_count(*counts: int) -> None:
    if len(set(counts)) > 1 or not counts[0]:
        got = ", ".join(str(count) for count in counts)
        raise UsageError(
            f"expected one entry a prompt in every list and at least one, got {got}: pass lists that agree"
        )
