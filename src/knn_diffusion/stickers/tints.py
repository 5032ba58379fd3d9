"""Stickers in a named colour: what covers most of the art takes the colour, shading, outlines and eyes stay.

The art is split into a few colours in OKLab (Ottosson 2020); those that make up its body are moved to the named colour,
each pixel by how much it belongs to them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

TINTS = {
    "red": (0.58, 0.22, 27), "orange": (0.74, 0.17, 58), "yellow": (0.89, 0.18, 98), "green": (0.63, 0.17, 145),
    "teal": (0.65, 0.11, 190), "blue": (0.58, 0.17, 255), "purple": (0.55, 0.18, 305), "pink": (0.78, 0.15, 355),
    "brown": (0.46, 0.08, 52), "grey": (0.62, 0.0, 0), "black": (0.24, 0.0, 0), "white": (0.96, 0.0, 0),
}  # fmt: skip
"""Lightness 0…1, chroma and hue in degrees of the named colours, in OKLCh."""
NUM_COLOURS = 8
ROUNDS = 8
COVER = 0.6
"""Share of the visible area that is moved."""
CLOSENESS = np.array([0.6, 1.6, 1.6])
"""Hue and chroma count more than lightness, so that shading stays within a colour."""
SHARPNESS = 0.045
DARK, PALE = 0.33, 0.93
"""Lightness of what is outline or gleam, and not body, unless nearly everything is."""
STEEPEST = 1.6
NEAR = 0.07
"""Colours nearer than this are shades of one another."""
SMALLEST_BODY = 0.4
SAME_COLOUR = 0.12
LOST = 0.17
"""Distance in OKLab below which a detail is lost on the body, if it was twice as far before."""
SMALLEST_DETAIL = 0.006
"""Share of the visible area from which a colour is a detail to keep visible."""

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_FROM_LAB, _FROM_LMS = np.linalg.inv(_TO_LAB), np.linalg.inv(_TO_LMS)

Colours = Float[np.ndarray, "... 3"]


@functools.cache
def _linear() -> Float[np.ndarray, "256"]:
    level = np.arange(256) / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> Colours:
    """sRGB levels 0…255 as OKLab."""
    return np.cbrt(_linear()[rgb] @ _TO_LMS.T) @ _TO_LAB.T


def rgb(lab: Colours) -> np.ndarray:
    """OKLab as sRGB levels 0…255, clipped."""
    light = np.clip((lab @ _FROM_LAB.T) ** 3 @ _FROM_LMS.T, 0, 1)
    level = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(level * 255).astype(np.uint8)


def _squared_distances(pixels: Colours, centres: Colours) -> np.ndarray:
    here, there = pixels * CLOSENESS, centres * CLOSENESS
    return np.maximum((here**2).sum(-1)[:, None] - 2 * here @ there.T + (there**2).sum(-1), 0)


def palette(pixels: Colours) -> tuple[Colours, Float[np.ndarray, "colours"]]:
    """The main colours and the share of each, largest first: k-means from spread-out beginnings, no chance in it."""
    centres = pixels.mean(0)[None]
    nearest = _squared_distances(pixels, centres)[:, 0]
    for _ in range(NUM_COLOURS - 1):
        centres = np.concatenate([centres, pixels[nearest.argmax()][None]])
        nearest = np.minimum(nearest, _squared_distances(pixels, centres[-1:])[:, 0])
    for _ in range(ROUNDS):
        members = np.eye(NUM_COLOURS)[_squared_distances(pixels, centres).argmin(1)]
        counts = members.sum(0)[:, None]
        centres = np.where(counts > 0, members.T @ pixels / np.maximum(counts, 1), centres)
    shares = np.bincount(_squared_distances(pixels, centres).argmin(1), minlength=NUM_COLOURS) / len(pixels)
    order = np.argsort(-shares, kind="stable")
    return centres[order], shares[order]


def _body(centres: Colours, shares: np.ndarray) -> np.ndarray:
    """Which colours are moved: the largest ones until they cover enough, outlines and gleams last."""
    chroma = np.hypot(centres[:, 1], centres[:, 2])
    aside = (centres[:, 0] < DARK) | ((centres[:, 0] > PALE) & (chroma < 0.05))
    order = np.argsort(aside, kind="stable")
    if shares[aside].sum() > 0.7:
        order = np.arange(len(shares))
    moved = np.zeros(len(shares), bool)
    for k in order:
        if shares[moved].sum() >= COVER or (aside[k] and shares[moved].sum() >= 0.35):
            break
        moved[k] = True
    return moved | (_squared_distances(centres, centres[moved]).min(1) < NEAR**2)


def visible(image: Image.Image, side: int = 40) -> Colours:
    """OKLab colours of what is seen of a transparent picture, from a small copy."""
    small = np.asarray(image.resize((side, side), Image.Resampling.BOX))
    return oklab(small[small[..., 3] > 160][:, :3])


def _moved_lightness(light: np.ndarray, middle: float, aim: float) -> np.ndarray:
    below, above = min(aim / max(middle, 0.05), STEEPEST), min((1 - aim) / max(1 - middle, 0.05), STEEPEST)
    return np.clip(aim + np.where(light < middle, below, above) * (light - middle), 0, 1)


@dataclass(frozen=True, slots=True)
class Body:
    """What of a sticker takes a tint: its main colours, which of them are moved, and their mean lightness."""

    centres: Colours
    shares: Float[np.ndarray, "colours"]
    moved: Bool[np.ndarray, "colours"]

    @property
    def lightness(self) -> float:
        """Mean lightness of what is moved."""
        return float((self.centres[self.moved, 0] * self.shares[self.moved]).sum() / self.shares[self.moved].sum())

    def turned(self, lab: Colours, name: str) -> Colours:
        """The colours moved to the named one, darker and lighter among themselves as before."""
        aim, chroma, hue = TINTS[name]
        light = _moved_lightness(lab[..., 0], self.lightness, aim)
        strength = chroma * np.minimum(1, (1 - light) / max(1 - aim, 1e-3) * 0.7 + 0.3)
        angle = math.radians(hue)
        return np.stack([light, strength * math.cos(angle), strength * math.sin(angle)], -1)

    def bears(self, name: str) -> bool:
        """True if enough of the sticker takes the tint and its details stay visible on it."""
        details = self.centres[~self.moved & (self.shares > SMALLEST_DETAIL)]
        body = self.centres[self.moved]
        before = np.sqrt(((details[:, None] - body) ** 2).sum(-1)).min(1)
        after = np.sqrt(((details[:, None] - self.turned(body, name)) ** 2).sum(-1)).min(1)
        lost = (after < LOST) & (after < 0.5 * before)
        return bool(self.shares[self.moved].sum() >= SMALLEST_BODY and not lost.any())

    def colour(self) -> str | None:
        """The name of the colour that the body has as it is, None where no name fits."""
        body = (self.centres[self.moved] * self.shares[self.moved, None]).sum(0) / self.shares[self.moved].sum()
        names = list(TINTS)
        angles = np.radians([TINTS[name][2] for name in names])
        light, chroma = np.array([TINTS[name][:2] for name in names]).T
        known = np.stack([light, chroma * np.cos(angles), chroma * np.sin(angles)], -1)
        distance = np.sqrt((((known - body) * CLOSENESS) ** 2).sum(-1))
        return names[int(distance.argmin())] if distance.min() < SAME_COLOUR else None


def body_of(image: Image.Image) -> Body | None:
    """What of the art (RGBA) takes a tint; None where too little is seen."""
    pixels = visible(image)
    if len(pixels) < NUM_COLOURS:
        return None
    centres, shares = palette(pixels)
    return Body(centres, shares, _body(centres, shares))


def _distinct(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each colour once, and which of them each pixel has: drawn art has few."""
    packed = colours.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    found, which = np.unique(packed, return_inverse=True)
    return np.stack([found >> 16, found >> 8 & 255, found & 255], -1).astype(np.uint8), which


def tint(image: Image.Image, name: str, body: Body) -> Image.Image:
    """The art (RGBA) in a named colour."""
    levels = np.asarray(image)
    seen = levels[..., 3] > 0
    colours, which = _distinct(levels[seen][:, :3])
    lab = oklab(colours)
    nearness = -_squared_distances(lab, body.centres) / SHARPNESS**2
    belonging = np.exp(nearness - nearness.max(1, keepdims=True))
    weight = (belonging[:, body.moved].sum(1) / belonging.sum(1))[:, None]
    result = levels.copy()
    result[seen, :3] = rgb(lab + weight * (body.turned(lab, name) - lab))[which]
    return Image.fromarray(result, "RGBA")
