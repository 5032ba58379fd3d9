"""Axis words of every tensor signature, and the two values that travel between rooms.

batch     images worked on together          seq       tokens of one image, grid rows first (grid × grid)
vocab     codes of the tokenizer, V          classes   V + 1: the codes and, last, [MASK]
slots     1 + K entries of y (Eqs. 4, 5)     dim       width of the joint embedding space H
k         neighbors of one query             height, width, 3 (channels)   pixels
queries   searches done together             items     images of an index
width     the network's hidden size          steps     entries of a schedule table: 0 … N
m         neighbors whose tokens are read
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch seq"]
"""Codes in [0, vocab); in a noised x_n also the mask id, which is vocab."""

Logits = Float[Tensor, "batch seq vocab"]
"""Unnormalised log-probabilities of x_0; there is no [MASK] class, since x_0 is never masked."""

Steps = Int[Tensor, "batch"]
"""Diffusion steps n in 1 … N, one for each image."""

Embeddings = Float[np.ndarray, "queries dim"]
"""Unit vectors of the joint space H, float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What the denoiser is conditioned on: y of Eqs. 4 and 5.

    Slot 0 is the query (the image's own embedding in training, the text's at inference), slots 1 … K the neighbors,
    nearest first. A slot that is not `present` gets no attention; the null condition y' = 0 is all zeros and present.
    """

    y: Float[Tensor, "batch slots dim"]
    present: Bool[Tensor, "batch slots"]
    grids: Int[Tensor, "batch m seq"] | None = None
    """Tokens of the first m neighbors, for a denoiser that reads them."""
    grids_present: Bool[Tensor, "batch m"] | None = None
    """Which of these grids there are. The null condition has none; both are None where no grids are read."""

    def select(self, rows: slice | Sequence[int] | Tensor) -> Condition:
        """The given images only, in the given order."""
        picked = rows if isinstance(rows, slice | Tensor) else list(rows)
        return self._each(lambda part: part[picked])

    def to(self, device: torch.device | str) -> Condition:
        """The same on a device."""
        return self._each(lambda part: part.to(device))

    def expand(self, count: int) -> Condition:
        """One row for each of `count` images, of as many or of one."""
        return self._each(lambda part: part.expand(count, *part.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """The rows of all parts, which have grids all or none."""
        grids = [part.grids for part in parts if part.grids is not None]
        grids_present = [part.grids_present for part in parts if part.grids_present is not None]
        return Condition(
            y=torch.cat([part.y for part in parts]),
            present=torch.cat([part.present for part in parts]),
            grids=torch.cat(grids) if grids else None,
            grids_present=torch.cat(grids_present) if grids_present else None,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(
            y=change(self.y),
            present=change(self.present),
            grids=None if self.grids is None else change(self.grids),
            grids_present=None if self.grids_present is None else change(self.grids_present),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbors:
    """The K nearest images of each query, best first.

    Rows shorter than k are filled with the empty id, score 0 and zero embeddings; `shortfall` says how many are missing.
    """

    ids: list[list[str]]
    scores: Float[np.ndarray, "queries k"]
    embeddings: Float[np.ndarray, "queries k dim"]
    shortfall: Int[np.ndarray, "queries"]
