"""Codes that the neighbors have near a token, offered to be used again: a pointer beside the vocabulary.

Axis words are those of `models.denoiser`; `offers` are the codes that may be copied for one token: those of all m grids in the
window × window tokens around its place.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

COMPARED = 16
"""Channels by which a token is compared with the neighbors' tokens."""


class Offers(NamedTuple):
    """What may be copied to each token, the same at every step."""

    codes: Int[Tensor, "*tokens offers"]
    keys: Float[Tensor, "*tokens offers compared"]
    present: Float[Tensor, "*tokens offers"]
    """1 where a grid offers a code, 0 where there is none."""

    def of(self, asked: Bool[Tensor, "batch seq"]) -> Offers:
        """Of some tokens only, one image after the other."""
        return Offers(*(part[asked] for part in self))


class CopyHead(nn.Module):
    """Adds a learned score to the logit of every code that a neighbor has near the token.

    Without it a code that stands in the neighbor's grid must be said anew through the vocabulary; with it the denoiser
    points. A code that several offers agree on gets the sum of their scores. No grid adds exactly nothing.

    Differs from the paper, whose neighbors are embeddings. Pointers beside a vocabulary: See et al. 2017 (arXiv 1704.04368).
    """

    def __init__(self, width: int, grid: int, neighbors: int, window: int) -> None:
        """Args: width: channels of a token; window: odd side of the square around a token in which a code may lie."""
        super().__init__()
        self.grid, self.window = grid, window
        self.query = nn.Linear(width, COMPARED, bias=False)
        self.key = nn.Linear(width, COMPARED, bias=False)
        self.say = nn.Linear(width, neighbors * window**2)

    def initialize_weights(self) -> None:
        """At first every offer has nearly no say."""
        nn.init.normal_(self.say.weight, std=0.1 * self.say.in_features**-0.5)

    def offers(
        self,
        codes: Int[Tensor, "batch m seq"],
        tokens: Float[Tensor, "batch m seq local_width"],
        present: Bool[Tensor, "batch m"],
    ) -> Offers:
        """What the grids offer to each token. Args: tokens: features of the codes."""
        keys = self.key(functional.layer_norm(tokens, tokens.shape[-1:])) / sqrt(COMPARED)
        inside = torch.ones_like(codes, dtype=keys.dtype) * present[..., None]
        return Offers(self._near(codes[..., None])[..., 0], self._near(keys), self._near(inside[..., None])[..., 0])

    def _near(self, values: Shaped[Tensor, "batch m seq channels"]) -> Shaped[Tensor, "batch seq offers channels"]:
        """What lies around each token, 0 beyond the edge."""
        grid, window = self.grid, self.window
        image = rearrange(values, "b m (i j) c -> b i j m c", i=grid)
        image = functional.pad(image, (0, 0, 0, 0, *[window // 2] * 4))
        shifted = [image[:, i : i + grid, j : j + grid] for i in range(window) for j in range(window)]
        return rearrange(torch.stack(shifted, 4), "b i j m w c -> b (i j) (m w) c")

    def forward(
        self, logits: Float[Tensor, "*tokens vocab"], h: Float[Tensor, "*tokens local_width"], offers: Offers
    ) -> Float[Tensor, "*tokens vocab"]:
        """The logits with the offers' scores added, in place. Args: h: what the head reads."""
        alike = (self.query(h)[..., None, :] * offers.keys).sum(-1)
        scores = (alike + self.say(h)) * offers.present
        return logits.scatter_add_(-1, offers.codes, scores.to(logits.dtype))
