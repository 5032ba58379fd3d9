"""What runs around a sticker: its outline some way off, and its shadow."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int32
from PIL import Image, ImageFilter

MEASURED_SIDE = 1024
"""Distances are measured on at most this many pixels a side; they are smooth, so larger pictures interpolate them."""


def grown(alpha: Image.Image, width: float) -> Image.Image:
    """The shape of an alpha channel grown by `width` pixels on all sides, as a cutter could follow it; antialiased.

    The shape is where alpha is at least a half. Corners are round, inner ones too, and gaps narrower than four times the width
    close: the shape is grown by twice the width, then shrunk by the width again.
    """
    factor = min(1.0, MEASURED_SIDE / max(alpha.size))
    small = alpha
    if factor < 1:
        small = alpha.resize([max(1, round(side * factor)) for side in alpha.size], Image.Resampling.BOX)
    reach = width * factor
    margin = math.ceil(2 * reach) + 2
    coverage = np.pad(np.asarray(small, np.float32) / np.float32(255), margin)
    widened = np.clip(2 * reach + 0.5 - distance_to_shape(coverage, 2 * reach + 1), 0, 1).astype(np.float32)
    depth = distance_to_shape(1 - widened, reach + 1)[margin:-margin, margin:-margin]
    inside = Image.fromarray(depth - np.float32(reach))
    if factor < 1:
        inside = inside.resize(alpha.size, Image.Resampling.BICUBIC)
    covered = np.clip(np.asarray(inside) / factor + 0.5, 0, 1)
    return Image.fromarray(np.rint(255 * covered).astype(np.uint8))


def distance_to_shape(coverage: Float[np.ndarray, "height width"], reach: float) -> Float[np.ndarray, "height width"]:
    """Distance in pixels from each pixel's centre to the edge of the shape, where coverage passes a half; at most `reach`.

    A pixel that the edge cuts says by its coverage where it lies, so that slanted edges get no steps. Inside the shape the
    distance is at most zero. The nearest solid pixel is first found in each row, then among the rows.
    """
    rows, columns = coverage.shape
    nearest = _nearest_in_row(coverage >= 0.5)
    across = ((np.arange(columns) - nearest) ** 2).astype(np.float32)
    beyond = np.take_along_axis(coverage, nearest.clip(0, columns - 1), axis=1) - np.float32(0.5)
    distance = np.full_like(coverage, reach)
    steps = min(math.ceil(reach), rows - 1)
    for down in range(-steps, steps + 1):
        here = slice(max(0, -down), rows - max(0, down))
        there = slice(max(0, down), rows + min(0, down))
        found = np.sqrt(across[there] + np.float32(down**2)) - beyond[there]
        np.minimum(distance[here], found, out=distance[here])
    return distance


def _nearest_in_row(solid: Bool[np.ndarray, "height width"]) -> Int32[np.ndarray, "height width"]:
    """Column of the nearest solid pixel of the same row; far outside where the row has none."""
    columns, far = np.arange(solid.shape[1], dtype=np.int32), np.int32(30_000)
    before = np.maximum.accumulate(np.where(solid, columns, -far), axis=1)
    after = np.minimum.accumulate(np.where(solid, columns, far)[:, ::-1], axis=1)[:, ::-1]
    return np.where(columns - before <= after - columns, before, after)


def shadow(shape: Image.Image, down: float, blur: float, strength: float) -> Image.Image:
    """Alpha of a soft shadow: the shape some pixels further down, blurred by a Gaussian of that deviation."""
    moved = Image.new("L", shape.size)
    moved.paste(shape, (0, round(down)))
    return moved.filter(ImageFilter.GaussianBlur(blur)).point([round(level * strength) for level in range(256)])
