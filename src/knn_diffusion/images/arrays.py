"""Pictures, arrays of bytes and tensors of pixels; and the one resize everything goes through."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from knn_diffusion.errors import UsageError
from knn_diffusion.images.decode import open_image


def square(image: Image.Image, size: int) -> Image.Image:
    """The centred square of the picture at `size` × `size` pixels, in RGB, antialiased.

    The only resize of the package, so that training, index and query images are seen alike. Whole-number reductions
    average blocks, all others use Lanczos. Raises: UsageError when size is below 1.
    """
    if size < 1:
        raise UsageError(f"expected a size of at least 1 pixel, got {size}: choose the size of the model")
    picture = image if image.mode == "RGB" else open_image(image)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    centre = picture.crop((left, top, left + side, top + side))  # resize(box=...) would let the outside bleed in
    if side % size == 0:
        return centre if side == size else centre.reduce(side // size)
    return centre.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)


def to_array(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """The RGB bytes of a picture."""
    return np.array(image if image.mode == "RGB" else open_image(image), dtype=np.uint8)


def from_array(array: UInt8[np.ndarray, "height width 3"]) -> Image.Image:
    """The picture of RGB bytes."""
    return Image.fromarray(np.ascontiguousarray(array))


def pixels_from_uint8(array: UInt8[np.ndarray, "n height width 3"]) -> Float[Tensor, "n 3 height width"]:
    """RGB bytes, 0…255, to pixels in [-1, 1]."""
    levels = torch.from_numpy(np.array(array, order="C"))  # a copy: memory-mapped arrays are read-only
    return levels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def uint8_from_pixels(pixels: Float[Tensor, "n 3 height width"]) -> UInt8[np.ndarray, "n height width 3"]:
    """Pixels to RGB bytes; what lies outside [-1, 1] is clamped."""
    levels = pixels.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
