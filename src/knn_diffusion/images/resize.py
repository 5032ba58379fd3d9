"""Finished pictures at any size: crisp outlines for stickers, plain Lanczos for opaque pictures.

What a network looks at is never resized here, but by `square` and `frame`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageFilter

Resampler = Literal["auto", "crisp", "lanczos"]
RESAMPLERS: tuple[Resampler, ...] = ("auto", "crisp", "lanczos")

SPREAD = 4
"""Colours of solid pixels are spread this many pixels outwards before the picture is enlarged."""
COLOUR_SLOPE, ALPHA_SLOPE = 3.0, 4.0
"""How much steeper edges become, at most; as much as the picture grows leaves them about a pixel wide."""


def resized(image: Image.Image, width: int, height: int, resampler: Resampler = "auto") -> Image.Image:
    """The picture at this size, RGB or RGBA as it was; the picture itself where the size stays.

    Colours are weighted by their alpha, so that nothing bleeds in from where nothing is seen.

    Args:
        resampler: "lanczos" is the plain filter. "crisp" enlarges by Lanczos too, then makes edges as narrow as they were in
            pixels: flat art stays sharp, photographs look painted. "auto" is crisp for a picture with transparency and Lanczos
            for an opaque one. Smaller pictures are made by Lanczos in any case.
    """
    if image.size == (width, height):
        return image
    growth = min(width / image.width, height / image.height)
    if growth > 1 and (resampler == "crisp" or (resampler == "auto" and image.mode == "RGBA")):
        return _crisp(image, width, height, growth)
    weighted = image.convert("RGBa") if image.mode == "RGBA" else image
    return weighted.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0).convert(image.mode)


def _crisp(image: Image.Image, width: int, height: int, growth: float) -> Image.Image:
    levels = np.array(image)
    slopes = [min(growth, COLOUR_SLOPE)] * 3
    if image.mode == "RGBA":
        levels[..., :3] = _spread(levels[..., :3].astype(np.float32), levels[..., 3] > 127)
        slopes.append(min(growth, ALPHA_SLOPE))
    channels = [
        _steepened(Image.fromarray(np.ascontiguousarray(levels[..., i])), (width, height), slope)
        for i, slope in enumerate(slopes)
    ]
    return Image.merge(image.mode, channels)


def _steepened(channel: Image.Image, size: tuple[int, int], slope: float) -> Image.Image:
    """Lanczos, with each value moved away from the middle of what surrounds it, and never beyond: so nothing rings either."""
    smooth = np.asarray(channel.convert("F").resize(size, Image.Resampling.LANCZOS))
    low, high = (
        np.asarray(channel.filter(extreme).resize(size, Image.Resampling.BILINEAR), np.float32)
        for extreme in (ImageFilter.MinFilter(3), ImageFilter.MaxFilter(3))
    )
    steep = (smooth - (low + high) / 2) * slope + (low + high) / 2
    return Image.fromarray(np.rint(np.clip(steep, low, high)).astype(np.uint8))


def _spread(
    colours: Float[np.ndarray, "height width 3"], solid: Bool[np.ndarray, "height width"]
) -> Float[np.ndarray, "height width 3"]:
    """Colours with those of the solid pixels also in the pixels around them, which are mixed with nothing or are nothing."""
    known, colours = solid.astype(np.float32), colours.copy()
    for _ in range(SPREAD):
        sums, count = _around(colours * known[..., None]), _around(known[..., None])
        new = (known == 0) & (count[..., 0] > 0)
        colours[new] = sums[new] / count[new]
        known[new] = 1
    return colours


def _around(values: Float[np.ndarray, "height width channels"]) -> Float[np.ndarray, "height width channels"]:
    """Sums over each pixel and its eight neighbors."""
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
