"""What training does to y before the denoiser sees it, and which neighbors of an image it is shown.

An image's nearest neighbors show nearly the image itself, and a denoiser that reads their tokens would learn to copy the first
one. So neighbors are left out, change places and move: what they have in common must be read, not one of them. All is drawn
from the step's generator.

Differs from the paper, where the K nearest are shown as they are; with the fields' defaults that is so here.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from knn_diffusion.config import config, require
from knn_diffusion.randomness import rand

ABSENT = -1


@config
class ConditioningConfig:
    """What training does to y before the denoiser sees it.

    k                  neighbors of each image, at least 0; 0 trains the baselines without retrieval (Sec. 4.4, Table 3)
    condition_dropout  share of images that get the null condition, which trains guidance's other half; the paper's is 0
    query_dropout      share of images whose own embedding is hidden, so that neighbors alone must do; the paper's is 0
    query_noise        share of a random direction in the image's own embedding, as LAFITE does with 0.75; the paper's is 0
    candidates         nearest images of which the k shown are chosen, where some are left out; 0 for k
    neighbor_dropout   chance of each neighbor to be left out, its embedding and its grid
    skip_nearest       share of images whose nearest r neighbors are left out; r is 1, 2, 3 … with chances ½, ¼, ⅛ …
    shuffle_leader     share of images whose first neighbor changes places with another of those whose grids are read
    style_leader       share of images whose first neighbor is the one that uses the most alike tokens, which shows the style
    grid_dropout       share of images of which no neighbor's grid is shown
    grid_shift         whole tokens that each grid is moved by at most, either way and along both axes, at least 0
    """

    k: int = 10
    condition_dropout: float = 0.1
    query_dropout: float = 0.0
    query_noise: float = 0.0
    candidates: int = 0
    neighbor_dropout: float = 0.0
    skip_nearest: float = 0.0
    shuffle_leader: float = 0.0
    style_leader: float = 0.0
    grid_dropout: float = 0.0
    grid_shift: int = 0

    def __post_init__(self) -> None:
        for name in ("k", "candidates", "grid_shift"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        shares = ("condition_dropout", "query_dropout", "query_noise", "neighbor_dropout", "skip_nearest")
        for name in (*shares, "shuffle_leader", "style_leader", "grid_dropout"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        most = 1 - self.shuffle_leader
        require(self.style_leader <= most, "style_leader", self.style_leader, f"at most {most:g} with shuffle_leader")
        enough = self.candidates == 0 or self.candidates >= self.k
        require(enough, "candidates", self.candidates, f"0 or at least k, {self.k}")

    @property
    def kept(self) -> int:
        """Neighbors of each image to look up."""
        return max(self.k, self.candidates)

    @property
    def steady(self) -> ConditioningConfig:
        """The k nearest neighbors of every image as they are, to judge a denoiser by."""
        return ConditioningConfig(
            k=self.k,
            condition_dropout=self.condition_dropout,
            query_dropout=self.query_dropout,
            query_noise=self.query_noise,
            candidates=self.candidates,
        )


def left_in(
    lists: Int[np.ndarray, "batch kept"], settings: ConditioningConfig, generator: torch.Generator
) -> Int[np.ndarray, "batch k"]:
    """The first k neighbors after some were left out, nearest first, ABSENT where there are fewer."""
    batch, kept = lists.shape
    luck = rand(batch, 2 + kept, generator=generator).numpy()
    found = (lists != ABSENT).sum(1)
    skipped = 1 + np.floor(-np.log2(np.maximum(luck[:, 1], 2.0**-30))).astype(np.int64)
    skipped = np.where(luck[:, 0] < settings.skip_nearest, np.minimum(skipped, np.maximum(found - 1, 0)), 0)
    position = np.arange(kept)
    left = (lists != ABSENT) & (position >= skipped[:, None]) & (luck[:, 2:] >= settings.neighbor_dropout)
    order = np.where(left, position, position + kept).argsort(1)[:, : settings.k]
    return np.where(np.take_along_axis(left, order, 1), np.take_along_axis(lists, order, 1), ABSENT)


def leaders(
    counts: Int[np.ndarray, "batch"],
    styled: Int[np.ndarray, "batch"],
    settings: ConditioningConfig,
    generator: torch.Generator,
) -> Int[np.ndarray, "batch"]:
    """Which neighbor changes places with the first of each image; 0 for none.

    Args:
        counts: how many neighbors may lead.
        styled: the one whose tokens are most like the image's.
    """
    chance, which = rand(len(counts), 2, generator=generator).numpy().T
    other = 1 + np.floor(which * (counts - 1)).astype(np.int64)
    shuffled = (chance < settings.style_leader + settings.shuffle_leader) & (counts > 1)
    return np.where(chance < settings.style_leader, styled, np.where(shuffled, other, 0))


def swapped(lists: Int[np.ndarray, "batch k"], leader: Int[np.ndarray, "batch"]) -> Int[np.ndarray, "batch k"]:
    """Each list with its first entry and the leader's changed."""
    made, rows = lists.copy(), np.arange(len(lists))
    made[rows, 0], made[rows, leader] = lists[rows, leader], lists[:, 0]
    return made


def most_alike(
    tokens: Int[np.ndarray, "batch seq"], others: Int[np.ndarray, "batch k seq"], there: np.ndarray
) -> Int[np.ndarray, "batch"]:
    """Which of the others' tokens are the same ones about as often (Bhattacharyya's measure); 0 where none are there."""
    codes = int(max(tokens.max(), others.max())) + 1

    def often(grids: np.ndarray) -> np.ndarray:
        flat = grids.reshape(-1, grids.shape[-1]).astype(np.int64)
        counts = np.zeros((len(flat), codes), np.float32)
        np.add.at(counts, (np.arange(len(flat))[:, None], flat), 1)
        return np.sqrt(counts).reshape(*grids.shape[:-1], codes)

    likeness = np.einsum("bv,bkv->bk", often(tokens), often(others))
    return np.where(there, likeness, -1.0).argmax(1)


def moved(grids: Int[Tensor, "batch m seq"], most: int, generator: torch.Generator) -> Int[Tensor, "batch m seq"]:
    """Each grid moved by up to `most` tokens along both axes; what comes in at the border is the token of its first corner."""
    if most == 0:
        return grids
    batch, m, seq = grids.shape
    side = int(seq**0.5)
    way = (rand(batch, m, 2, generator=generator) * (2 * most + 1)).long() - most
    at = torch.arange(side)
    row, column = (at - way[..., axis, None] for axis in (0, 1))  # batch m side, where each comes from
    inside = ((row >= 0) & (row < side))[..., :, None] & ((column >= 0) & (column < side))[..., None, :]
    source = row.clamp(0, side - 1)[..., :, None] * side + column.clamp(0, side - 1)[..., None, :]
    return torch.where(inside.flatten(2), grids.gather(2, source.flatten(2)), grids[..., :1])
