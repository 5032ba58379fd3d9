"""Axis words of every tensor signature, and the two values that travel between rooms.

batch     images worked on together          seq       tokens of one image, grid rows first (grid × grid)
vocab     codes of the tokenizer, V          classes   V + 1: the codes and, last, [MASK]
slots     1 + K entries of y (Eqs. 4, 5)     dim       width of the joint embedding space H
k         neighbors of one query             height, width, 3 (channels)   pixels
queries   searches done together             items     images of an index
width     the network's hidden size          steps     entries of a schedule table: 0 … N
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbors:
    """The K nearest images of each query, best first.

    Rows shorter than k are filled with the empty id, score 0 and zero embeddings; `shortfall` says how many are missing.
    """

    ids: list[list[str]]
    scores: Float[np.ndarray, "queries k"]
    embeddings: Float[np.ndarray, "queries k dim"]
    shortfall: Int[np.ndarray, "queries"]
