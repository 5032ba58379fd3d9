"""Features of known distribution: a Gaussian with random mixing, and one as wide as the judge's with a spectrum like theirs."""

from __future__ import annotations

import numpy as np


def features(count: int, width: int, seed: int, rank: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rank or width, width))
    return rng.normal(size=(count, rank or width)) @ mixing + rng.normal(size=width)


def like_the_judges(count: int, seed: int, width: int = 256, scale: float = 1.0) -> np.ndarray:
    """Mean 0, eigenvalues that fall as 1 / number and sum to 175: as far apart as stickers are in the judge's features."""
    spectrum = 1 / np.arange(1, width + 1)
    spectrum *= 175 / spectrum.sum()
    return scale * np.random.default_rng(seed).normal(size=(count, width)) * np.sqrt(spectrum)
