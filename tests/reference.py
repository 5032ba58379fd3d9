"""The mathematics again, slowly: dense float64 matrices straight from Eqs. 1-3, to hold the package to.

Nothing here shares code with the package. Distributions over x_n are columns of V + 1 entries, [MASK] last.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np


def tables(num_steps: int, preset: str) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative keep and mask probabilities for steps 0 … N, each schedule as its source states it."""
    n = np.arange(num_steps + 1)
    if preset == "released":
        keep = 0.99999 + (n - 1) / (num_steps - 1) * (0.000009 - 0.99999)
        mask = 0.000009 + (n - 1) / (num_steps - 1) * (0.99999 - 0.000009)
        keep[0], mask[0] = 1, 0
        return keep, mask
    return 1 - n / num_steps, (0.9 if preset == "mask-and-replace" else 1) * n / num_steps


def matrix(num_steps: int, vocab_size: int, preset: str, n: int) -> np.ndarray:
    """Q_n of Eq. 2: column = state before, row = state after."""
    keep, mask = tables(num_steps, preset)
    alpha = keep[n] / keep[n - 1]
    gamma = 1 - (1 - mask[n]) / (1 - mask[n - 1])
    beta = max(1 - alpha - gamma, 0) / vocab_size
    q = np.full((vocab_size + 1, vocab_size + 1), beta) + np.diag([alpha] * (vocab_size + 1))
    q[vocab_size] = gamma
    q[:, vocab_size] = 0
    q[vocab_size, vocab_size] = 1
    return q


@functools.cache
def product(num_steps: int, vocab_size: int, preset: str, n: int, after: int = 0) -> np.ndarray:
    """Q_n ⋯ Q_{after+1}, multiplied one by one."""
    q = np.eye(vocab_size + 1)
    for step in range(after + 1, n + 1):
        q = matrix(num_steps, vocab_size, preset, step) @ q
    q.setflags(write=False)
    return q


def posterior(forward: np.ndarray, prior: np.ndarray, p_x_0: np.ndarray, x_n: int) -> np.ndarray:
    """Σ p(x_0) q(x_s | x_n, x_0) by Bayes' rule; `forward` leads from s to n, `prior` from 0 to s."""
    result = np.zeros(len(forward))
    for x_0, p in enumerate(p_x_0):
        joint = forward[x_n] * prior[:, x_0]  # q(x_n | x_s) q(x_s | x_0) for every x_s
        if p > 0:
            result += p * joint / joint.sum()
    return result


def divergence(q: np.ndarray, p: np.ndarray) -> float:
    """KL(q ‖ p)."""
    held = q > 0
    return float((q[held] * np.log(q[held] / p[held])).sum())


def sequences(classes: int, length: int) -> list[tuple[int, ...]]:
    """Every sequence of `length` tokens."""
    return list(itertools.product(range(classes), repeat=length))
