"""How the transformer reads the neighbors' pictures themselves: attention to the places of their token grids.

Axis words are those of `models.denoiser`; `m` neighbors have a grid, `cells` are the places of all m grids, the first one's
first.

Differs from the paper, where a neighbor is its embedding alone. Re-Imagen (Chen et al. 2022) reads its neighbors' latents too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from knn_diffusion.models.attention import ABSENT, attend


class Grids(NamedTuple):
    """The neighbors' grids as all layers read them; an absent one has the offset ABSENT and the value 0."""

    keys: Float[Tensor, "batch heads cells channels"]
    offsets: Float[Tensor, "batch 1 1 cells"]
    values: Float[Tensor, "batch heads cells channels"]
    leader: Float[Tensor, "batch seq local_width"]
    """Features of the first present grid's tokens, 0 where there is none."""


class GridReader(nn.Module):
    """Keys and values of the neighbors' grids, made once for all layers that read them and all steps."""

    def __init__(self, width: int, heads: int, side: int, neighbors: int) -> None:
        super().__init__()
        self.heads = heads
        self.row_table = nn.Parameter(torch.empty(side, 1, width))
        self.column_table = nn.Parameter(torch.empty(side, width))
        self.rank_table = nn.Parameter(torch.empty(neighbors, 1, width))
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)

    def initialize_weights(self) -> None:
        """Where a cell lies and whose it is are as loud as what it shows."""
        for table in (self.row_table, self.column_table, self.rank_table):
            nn.init.normal_(table, std=3**-0.5)

    def forward(
        self,
        places: Float[Tensor, "batch m places width"],
        tokens: Float[Tensor, "batch m seq local_width"],
        present: Bool[Tensor, "batch m"],
    ) -> Grids:
        """Args: tokens: features of single tokens, of which `places` were merged."""
        where = (self.row_table + self.column_table).flatten(0, 1) + self.rank_table  # m places width
        cells = self.norm(places + where.to(places.dtype)).flatten(1, 2)  # batch cells width
        keys, values = rearrange(self.key_value(cells), "b s (two n c) -> two b n s c", two=2, n=self.heads)
        absent = ~present.repeat_interleave(places.shape[2], dim=1)[:, None, None, :]  # batch 1 1 cells
        offsets = torch.zeros_like(absent, dtype=keys.dtype).masked_fill(absent, ABSENT)
        first = tokens[torch.arange(len(tokens), device=tokens.device), present.int().argmax(1)]
        leader = first.masked_fill(~present.any(1)[:, None, None], 0)
        values = values.masked_fill(absent.transpose(-1, -2), 0)
        return Grids(keys.contiguous(), offsets, values.contiguous(), leader)  # else each layer would copy them


class GridAttention(nn.Module):
    """Each place looks at all places of all neighbors; no grid adds exactly nothing.

    It looks at every place, not only at its own: neighbors show the thing elsewhere, larger, or turned. Scores also depend
    on how far a cell lies from the place, learned for each head; at first some heads look at their own place and others anywhere.
    """

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.nearness = nn.Parameter(torch.empty(heads, (2 * side - 1) ** 2))
        at = torch.arange(side)
        away = at[:, None] - at[None] + side - 1  # side side
        offset = away[:, None, :, None] * (2 * side - 1) + away[None, :, None, :]  # row column row column
        self.register_buffer("offset", offset.reshape(side**2, side**2), persistent=False)
        self.offset: Tensor
        self.side = side

    def initialize_weights(self, layers: int) -> None:
        """All `layers` together add unit variance to the stream, heads look from nearly 0 to 8 places far."""
        nn.init.normal_(self.output.weight, std=(layers * self.output.in_features) ** -0.5)
        away = torch.arange(1 - self.side, self.side)
        square = (away[:, None].square() + away.square()).flatten()
        reach = 2 ** torch.linspace(-0.5, 3, self.heads)
        with torch.no_grad():
            self.nearness.copy_(-square / (2 * reach[:, None].square()))

    def forward(self, h: Float[Tensor, "batch places width"], grids: Grids) -> Float[Tensor, "batch places width"]:
        """What the places read."""
        query = self.query(functional.layer_norm(h, h.shape[-1:]))
        query = rearrange(query, "b s (n c) -> b n s c", n=self.heads)
        near = self.nearness.to(query.dtype)[:, self.offset]  # heads places places
        m = grids.keys.shape[2] // near.shape[-1]
        offsets = near.repeat(1, 1, m) + grids.offsets  # batch heads places cells
        return self.output(rearrange(attend(query, grids.keys, grids.values, offsets), "b n s c -> b s (n c)"))
