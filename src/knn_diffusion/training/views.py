"""Random views of framed pictures, as the encoder sees them in training: placed and lit differently, on other grounds.

Colours stay what they are, since captions name them; only pictures whose captions name none may lose them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from knn_diffusion.config import config, require


@config
class ViewConfig:
    """How far views differ from the picture as the encoder reads it later."""

    shrink: float = 1.6
    """The picture is shrunk by up to this, ≥ 1; half of the views by no more than a tenth."""
    enlarge: float = 0.05
    """It is enlarged by up to this share, so that its edges leave the frame."""
    turn: float = 10.0
    """Degrees to either side, of half of the views."""
    stretch: float = 0.08
    """Width over height changes by up to this share."""
    light: float = 0.2
    """Brightness and contrast each change by up to this share."""
    faded: float = 0.15
    """Share of views without colours, where no caption names one."""
    own_ground: float = 0.5
    """Share of views on the encoder's own ground; half of the others are on white, the rest on any colour."""

    def __post_init__(self) -> None:
        require(self.shrink >= 1, "shrink", self.shrink, "at least 1")
        require(0 <= self.turn <= 90, "turn", self.turn, "from 0 to 90")
        for name in ("enlarge", "stretch", "light", "faded", "own_ground"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share")


def views(
    pictures: UInt8[np.ndarray, "batch height width 4"],
    size: int,
    ground: int,
    cfg: ViewConfig,
    generator: torch.Generator,
    *,
    may_mirror: Bool[np.ndarray, "batch"],
    may_fade: Bool[np.ndarray, "batch"],
) -> Float[Tensor, "batch 3 size size"]:
    """One random view of each picture, in [-1, 1].

    Args:
        pictures: framed, RGBA; what leaves an opaque one's frame is filled with its edge.
        ground: the encoder's own, a grey level.
    """
    count = len(pictures)
    levels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
    alpha = levels[:, 3:]
    weighted = torch.cat([levels[:, :3] * alpha, alpha], 1)
    grid = F.affine_grid(
        _placements(count, cfg, torch.from_numpy(may_mirror), generator), [count, 4, size, size], align_corners=False
    )
    opaque = alpha.flatten(1).amin(1) == 1
    edge = 1 - 1 / pictures.shape[1]
    grid = torch.where(opaque[:, None, None, None], grid.clamp(-edge, edge), grid)
    seen = F.grid_sample(weighted, grid, align_corners=False)
    colours = seen[:, :3] + _grounds(count, ground / 255, cfg, generator) * (1 - seen[:, 3:])
    fades = (torch.rand(count, generator=generator) < cfg.faded) & torch.from_numpy(may_fade)
    colours = torch.where(fades[:, None, None, None], colours.mean(1, keepdim=True), colours)
    contrast, brightness = 1 + cfg.light * (2 * torch.rand(2, count, 1, 1, 1, generator=generator) - 1)
    return ((colours - 0.5) * contrast + 0.5 * brightness).clamp(0, 1) * 2 - 1


def _placements(
    count: int, cfg: ViewConfig, may_mirror: Bool[Tensor, "batch"], generator: torch.Generator
) -> Float[Tensor, "batch 2 3"]:
    """Affine maps from places of a view to places of the picture, both in [-1, 1]."""
    u = torch.rand(8, count, generator=generator)
    least, most = 1 - cfg.enlarge, torch.where(u[0] < 0.5, min(1.1, cfg.shrink), cfg.shrink)
    shrink = least + u[1] * (most - least)
    stretch = 1 + cfg.stretch * (u[2] - 0.5)
    angle = torch.where(u[3] < 0.5, math.radians(cfg.turn) * (2 * u[4] - 1), 0.0)
    mirror = torch.where((u[5] < 0.5) & may_mirror, -1.0, 1.0)
    cos, sin = angle.cos() * shrink, angle.sin() * shrink
    room = 0.3 * (shrink - 1 + 2 * cfg.enlarge)
    rows = [
        torch.stack([cos * mirror * stretch, -sin / stretch, room * (2 * u[6] - 1)], 1),
        torch.stack([sin * mirror * stretch, cos / stretch, room * (2 * u[7] - 1)], 1),
    ]
    return torch.stack(rows, 1)


def _grounds(count: int, own: float, cfg: ViewConfig, generator: torch.Generator) -> Float[Tensor, "batch 3 1 1"]:
    kind = torch.rand(count, 1, 1, 1, generator=generator)
    any_colour = torch.rand(count, 3, 1, 1, generator=generator)
    other = torch.where(kind < (1 + cfg.own_ground) / 2, torch.ones(()), any_colour)
    return torch.where(kind < cfg.own_ground, torch.full((), own), other)
