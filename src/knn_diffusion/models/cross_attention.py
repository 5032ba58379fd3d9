"""How the places of the transformer read y: attention to its slots, and to the slots' maps.

What depends on y alone is made once per image, as a `PreparedCondition`, and used at every step. A zero y adds exactly
nothing through either way. Axis words are those of `models.denoiser`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from knn_diffusion.models.attention import ABSENT
from knn_diffusion.models.copying import Offers
from knn_diffusion.models.neighbor_grids import Grids

KEYS_PER_VALUE = 4
"""A slot's map has one channel to be compared by for so many to be read."""


class Maps(NamedTuple):
    """Every slot of y laid out over the places; an absent slot has the offset ABSENT and the value 0."""

    keys: Float[Tensor, "batch places heads slots compared"]
    offsets: Float[Tensor, "batch 1 1 slots"]
    values: Float[Tensor, "batch places heads slots read"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedCondition:
    """y as the blocks read it: made once per image by `Denoiser.prepare`, used at every step.

    The first three are cross-attention's in each block.
    """

    keys: Float[Tensor, "depth batch width pairs"]
    offsets: Float[Tensor, "depth batch 1 pairs"]
    values: Float[Tensor, "depth batch pairs width"]
    maps: Maps | None = None
    grids: Grids | None = None
    offers: Offers | None = None

    @staticmethod
    def cat(parts: Sequence[PreparedCondition]) -> PreparedCondition:
        """The rows of all parts as one batch, for instance the conditional and then the null half of guidance."""
        maps = [part.maps for part in parts if part.maps is not None]
        grids = [part.grids for part in parts if part.grids is not None]
        offers = [part.offers for part in parts if part.offers is not None]
        return PreparedCondition(
            keys=torch.cat([part.keys for part in parts], dim=1),
            offsets=torch.cat([part.offsets for part in parts], dim=1),
            values=torch.cat([part.values for part in parts], dim=1),
            maps=Maps(*(torch.cat(same) for same in zip(*maps, strict=True))) if maps else None,
            grids=Grids(*(torch.cat(same) for same in zip(*grids, strict=True))) if grids else None,
            offers=Offers(*(torch.cat(same) for same in zip(*offers, strict=True))) if offers else None,
        )

    def select(self, rows: slice | Sequence[int] | Tensor) -> PreparedCondition:
        """The given images only, in the given order."""
        picked = rows if isinstance(rows, slice | Tensor) else list(rows)
        return PreparedCondition(
            keys=self.keys[:, picked],
            offsets=self.offsets[:, picked],
            values=self.values[:, picked],
            maps=None if self.maps is None else Maps(*(part[picked] for part in self.maps)),
            grids=None if self.grids is None else Grids(*(part[picked] for part in self.grids)),
            offers=None if self.offers is None else Offers(*(part[picked] for part in self.offers)),
        )


class CrossAttention(nn.Module):
    """Attention to the slots of y, with the projections of the many places folded into the few keys and values.

    The score (W_q h)·k equals h·(W_qᵀ k), and the output W_o Σ p v equals Σ p (W_o v). W_qᵀ k and W_o v depend on y
    alone, so `prepare` makes them once per image; a place then costs 2 · heads · slots · width products instead of
    2 · width² and the attention. For the paper's 11 slots and 16 heads that is a sixth.
    """

    def __init__(self, width: int, heads: int, condition_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key_value = nn.Linear(condition_dim, 2 * width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def prepare(
        self, y: Float[Tensor, "batch slots dim"], present: Bool[Tensor, "batch slots"]
    ) -> tuple[Float[Tensor, "batch width pairs"], Float[Tensor, "batch 1 pairs"], Float[Tensor, "batch pairs width"]]:
        """Keys, score offsets and values of y; an absent slot has the offset ABSENT and the value 0."""
        k, v = rearrange(self.key_value(y), "b s (two n c) -> two b n s c", two=2, n=self.heads)
        k = k / sqrt(k.shape[-1])
        absent = ~present[:, None, :, None]  # batch 1 slots 1
        keys = torch.einsum("bnsc,ncw->bwns", k, rearrange(self.query.weight, "(n c) w -> n c w", n=self.heads))
        values = torch.einsum("bnsc,wnc->bnsw", v, rearrange(self.output.weight, "w (n c) -> w n c", n=self.heads))
        offsets = torch.zeros_like(k[..., :1])
        if self.query.bias is not None:
            offsets = k @ rearrange(self.query.bias, "(n c) -> n c 1", n=self.heads)
        offsets = offsets.masked_fill(absent, ABSENT)
        values = values.masked_fill(absent, 0)  # a row without any present slot attends to zeros, as the null does
        return keys.flatten(2), rearrange(offsets, "b n s 1 -> b 1 (n s)"), values.flatten(1, 2)

    def forward(
        self,
        h: Float[Tensor, "batch places width"],
        keys: Float[Tensor, "batch width pairs"],
        offsets: Float[Tensor, "batch 1 pairs"],
        values: Float[Tensor, "batch pairs width"],
    ) -> Float[Tensor, "batch places width"]:
        """Read from y what `prepare` made of it; a zero y gives exactly zero."""
        scores = torch.baddbmm(offsets, h, keys)  # batch places pairs
        scores = rearrange(scores, "b s (n slots) -> b s n slots", n=self.heads)
        weights = scores.softmax(dim=-1).flatten(2)  # batch places pairs
        out = torch.bmm(weights.to(values.dtype), values)  # batch places width
        return out if self.output.bias is None else out + self.output.bias


class SlotMaps(nn.Module):
    """Every slot of y, projected and reshaped to a map over the places, as DCGAN starts from its latent vector.

    Through cross-attention alone each place hears the same few numbers and must work out its own part of the picture from
    them; that takes a transformer long to learn. Where the embedding holds looks, one linear map from it to all places says
    at once what is where, for unseen pictures too. It is applied once per image, not once per step and place.

    Differs from the paper, where y is read by cross-attention alone.
    """

    def __init__(self, condition_dim: int, places: int, heads: int, map_width: int) -> None:
        super().__init__()
        self.places, self.heads, self.compared = places, heads, map_width // KEYS_PER_VALUE
        self.lay_out = nn.Linear(condition_dim, places * (self.compared + map_width), bias=False)

    def forward(self, y: Float[Tensor, "batch slots dim"], present: Bool[Tensor, "batch slots"]) -> Maps:
        """Lay out y."""
        cells = rearrange(self.lay_out(y), "b s (p c) -> b p s c", p=self.places)
        keys = rearrange(cells[..., : self.compared], "b p s (n c) -> b p n s c", n=self.heads)
        values = rearrange(cells[..., self.compared :], "b p s (n c) -> b p n s c", n=self.heads)
        absent = ~present[:, None, None, :]  # batch 1 1 slots
        offsets = torch.zeros_like(absent, dtype=keys.dtype).masked_fill(absent, ABSENT)
        return Maps(keys / sqrt(keys.shape[-1]), offsets, values.masked_fill(absent[..., None], 0))


class MapAttention(nn.Module):
    """Each place looks at its own cell of every slot's map and takes what fits; a zero y gives exactly zero."""

    def __init__(self, width: int, heads: int, map_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, map_width // KEYS_PER_VALUE, bias=False)
        self.output = nn.Linear(map_width, width, bias=False)

    def forward(self, h: Float[Tensor, "batch places width"], maps: Maps) -> Float[Tensor, "batch places width"]:
        """What the places read. Tables this thin are multiplied and summed faster than as very many small products."""
        query = self.query(functional.layer_norm(h, h.shape[-1:]))
        query = rearrange(query, "b p (n c) -> b p n 1 c", n=self.heads)
        scores = (query * maps.keys).sum(-1) + maps.offsets  # batch places heads slots
        weights = scores.softmax(dim=-1).to(maps.values.dtype)
        read = (weights[..., None] * maps.values).sum(-2)  # batch places heads read
        return self.output(read.flatten(2))
