"""Images go through a network in batches of one size, so that a vector does not depend on its company.

A matrix product gives other last bits at another batch size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from knn_diffusion.shapes import Embeddings

IMAGES_AT_ONCE = 16


def in_fixed_batches(embed: Callable[[np.ndarray], Tensor], rows: np.ndarray, dim: int) -> Embeddings:
    """Embed rows; the last batch is filled up with its last row."""
    made = np.empty((len(rows), dim), np.float32)
    with torch.inference_mode():
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            some = rows[start : start + IMAGES_AT_ONCE]
            filled = np.concatenate([some, np.repeat(some[-1:], IMAGES_AT_ONCE - len(some), axis=0)])
            made[start : start + len(some)] = embed(filled)[: len(some)].cpu().numpy()
    return made
