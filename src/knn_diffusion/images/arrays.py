"""Images, arrays of bytes and tensors of pixels; and the one resize everything that is looked at goes through."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from knn_diffusion.errors import UsageError
from knn_diffusion.images.decode import open_image

RGBA_CHANNELS = 4
_AVERAGED_SIDE = 128
"""Larger pictures are first reduced to at least this side."""


def square(image: Image.Image, size: int) -> Image.Image:
    """The centred square of the picture at `size` × `size` pixels, in RGB, antialiased.

    The only resize for what a network sees, so that training, index and query images are seen alike. Whole-number reductions
    average blocks, all others use Lanczos. Raises: UsageError when size is below 1.
    """
    if size < 1:
        raise UsageError(f"expected a size of at least 1 pixel, got {size}: choose the size of the model")
    centre = _centre(image)
    if centre.width % size == 0:
        return centre if centre.width == size else centre.reduce(centre.width // size)
    return centre.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)


def averages(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Mean levels of size × size equal areas of the picture's centred square, whatever its side is.

    To tell copies by: a resized picture has the same means up to rounding. (A filter with lobes, as in `square`, moves them
    by 4 levels; block averages do it unless the side is a multiple of `size`.)
    """
    centre = _centre(image)
    centre = centre.reduce(max(1, centre.width // _AVERAGED_SIDE))
    levels, start = np.asarray(centre, np.float32), np.arange(centre.width)
    edges = np.linspace(0, centre.width, size + 1)[:, None]
    inside = np.clip(np.minimum(edges[1:], start + 1) - np.maximum(edges[:-1], start), 0, None)  # size side
    weights = (inside / inside.sum(1, keepdims=True)).astype(np.float32)
    rows = (weights @ levels.reshape(len(levels), -1)).reshape(size, -1, 3)  # size side 3
    means = np.einsum("bt,atc->abc", weights, rows)
    return np.rint(means).clip(0, 255).astype(np.uint8)


def _centre(image: Image.Image) -> Image.Image:
    """The centred square, in RGB; resize(box=...) would let the outside bleed in."""
    picture = image if image.mode == "RGB" else open_image(image)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def to_array(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """The RGB bytes of a picture."""
    return np.array(image if image.mode == "RGB" else open_image(image), dtype=np.uint8)


def from_array(array: UInt8[np.ndarray, "height width channels"]) -> Image.Image:
    """Return the image of RGB or RGBA bytes."""
    return Image.fromarray(np.ascontiguousarray(array))


def pixels_from_uint8(array: UInt8[np.ndarray, "n height width channels"]) -> Float[Tensor, "n channels height width"]:
    """Return pixels in [-1, 1] of RGB or RGBA bytes.

    With alpha, colours are premultiplied: mid grey, 0, stands where nothing is, so that hidden colours count for nothing.
    """
    levels = torch.from_numpy(np.array(array, order="C"))  # a copy: memory-mapped arrays are read-only
    pixels = levels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
    if pixels.shape[1] == RGBA_CHANNELS:
        pixels[:, :3] *= coverage(pixels)
    return pixels


def uint8_from_pixels(pixels: Float[Tensor, "n channels height width"]) -> UInt8[np.ndarray, "n height width channels"]:
    """Return the bytes of pixels; values outside [-1, 1] are clamped. Fully transparent pixels become zero bytes."""
    levels = pixels.detach().float()
    if levels.shape[1] == RGBA_CHANNELS:
        seen = coverage(levels)
        colour = (levels[:, :3] / seen.clamp_min(1 / 255)).where(seen > 0, -1)
        levels = torch.cat([colour, levels[:, 3:]], dim=1)
    levels = levels.add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def coverage(pixels: Float[Tensor, "n 4 height width"]) -> Float[Tensor, "n 1 height width"]:
    """Return alpha as a share from 0 to 1 of pixels that have it."""
    return pixels[:, 3:].add(1).div(2).clamp(0, 1)


def over_ground(
    pixels: Float[Tensor, "n channels height width"], ground: Float[Tensor, "n 3 1 1"]
) -> Float[Tensor, "n 3 height width"]:
    """Return RGB pixels composed over a ground of one colour in [-1, 1]; pixels without alpha come back as they are."""
    if pixels.shape[1] != RGBA_CHANNELS:
        return pixels
    return pixels[:, :3] + (1 - pixels[:, 3:]) / 2 * ground
