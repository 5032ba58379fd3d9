"""Images, arrays of bytes and tensors of pixels."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from knn_diffusion.images.decode import open_image
from knn_diffusion.images.framing import frame, square

RGBA_CHANNELS = 4


def to_array(image: Image.Image) -> UInt8[np.ndarray, "height width channels"]:
    """Return the bytes of an image: 4 channels, RGBA, if something shows through it, else 3."""
    return np.array(image if image.mode in ("RGB", "RGBA") else open_image(image), dtype=np.uint8)


def network_input(image: Image.Image, size: int, *, alpha: bool) -> UInt8[np.ndarray, "height width channels"]:
    """Return the bytes a network reads of an image: RGBA of its frame with `alpha`, else RGB as `square` makes it.

    Raises: UsageError when size is below 1; ImageError when the image is transparent everywhere.
    """
    return to_array(frame(image, size).convert("RGBA") if alpha else square(image, size))


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
