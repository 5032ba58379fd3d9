"""How a picture fills the frame: one rule for encoder, tokenizer, previews and denoiser; and the ground under transparency.

Transparent stickers come cut to the edge, with wide margins, or off centre. Framed by this rule they look the same to a network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from knn_diffusion.errors import ImageError, UsageError
from knn_diffusion.images.decode import NOISE, is_transparent, open_image

FRAMING = "trim-15/16"
"""Name of the rule `frame` follows, kept with what was made by it; another rule gets another name."""

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
GREY: Colour = (128, 128, 128)
Box = tuple[int, int, int, int]
"""Left, top, right and bottom, the last two exclusive."""

AVERAGED_SIDE = 128
"""Larger pictures are reduced to at least this side before they are averaged."""
SPECK = 1 / 8
"""Share of an opaque picture's longer side; anything smaller on a plain ground is a speck, not its subject."""
OUTLINE_SIDE = 128
"""The outline of larger pictures is looked at in a copy reduced to about this side."""
FAINT = 20
"""Mean difference in levels; an outline less different from its ground cannot be seen."""


def frame(image: Image.Image, size: int) -> Image.Image:
    """The picture at `size` × `size` pixels: trimmed, its longer side at 15/16 of the frame, centred.

    A picture with transparency is trimmed to what its alpha shows, and the result is RGBA. An opaque picture is RGB: where its
    whole edge is one colour, that ground is trimmed in the same way and fills the rest of the frame; any other is its centred
    square, as `square` makes it. Framing a framed picture changes nothing.

    Raises: UsageError when size is below 1; ImageError when the picture is transparent everywhere.
    """
    _require_size(size)
    picture = _opened(image)
    found = subject(picture)
    if found is None:
        return square(picture, size)
    box, ground = found
    return _placed(picture if len(ground) == 4 else picture.convert("RGB"), box, size, ground)


def subject(picture: Image.Image) -> tuple[Box, tuple[int, ...]] | None:
    """The box around what an RGB or RGBA picture shows, and the ground of its frame; None where its centred square is used.

    Raises: ImageError when it is transparent everywhere.
    """
    if is_transparent(picture):
        box = _box(picture, "A", (0,))
        if box is None:
            raise ImageError(
                f"expected a picture with something to see, got {picture.width} × {picture.height} pixels that are all "
                f"transparent (alpha of at most {NOISE} of 255): leave it out"
            )
        return box, (0, 0, 0, 0)
    opaque = picture.convert("RGB")
    ground = _plain_ground(opaque)
    box = None if ground is None else _box(opaque, "RGB", ground)
    if ground is None or box is None or longer_side(box) < SPECK * max(picture.width, picture.height):
        return None
    return box, ground


def longer_side(box: Box) -> int:
    """Of width and height."""
    return max(box[2] - box[0], box[3] - box[1])


def square(image: Image.Image, size: int) -> Image.Image:
    """The picture at `size` × `size` pixels for what reads RGB: its centred square, antialiased.

    One with transparency is framed and composed on a ground that shows it. Whole-number reductions average blocks, all others
    use Lanczos. Raises: as `frame`.
    """
    _require_size(size)
    picture = _opened(image)
    if is_transparent(picture):
        return on_ground(frame(picture, size))
    centre = _centre(picture)
    if centre.width % size == 0:
        return centre if centre.width == size else centre.reduce(centre.width // size)
    return centre.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)


def on_ground(image: Image.Image, ground: Colour | None = None) -> Image.Image:
    """The picture in RGB, composed on a colour where it is transparent; opaque ones are as they were.

    Args: ground: None takes `showing_ground`.
    """
    if image.mode != "RGBA":
        return image.convert("RGB")
    paper = Image.new("RGB", image.size, ground or showing_ground(image))
    paper.paste(image, mask=image)
    return paper


def showing_ground(image: Image.Image) -> Colour:
    """White, or mid grey for a picture that would vanish on white: one with most of its outline as light as that."""
    if not is_transparent(image):
        return WHITE
    factor = max(1, max(image.size) // OUTLINE_SIDE)
    small = np.asarray(image.reduce(factor), np.int16)
    drawn = np.pad(small[..., 3] > 127, 1)
    inside = drawn[:-2, 1:-1] & drawn[2:, 1:-1] & drawn[1:-1, :-2] & drawn[1:-1, 2:]
    outline = small[drawn[1:-1, 1:-1] & ~inside]
    if not len(outline):  # nothing but a veil
        outline = small[small[..., 3] > NOISE]
    contrast = (255 - outline[:, :3]).mean(1) * outline[:, 3] / 255
    return GREY if len(contrast) and (contrast < FAINT).mean() > 0.5 else WHITE


def averages(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Mean levels of size × size equal areas of the picture's centred square, or of its frame on a ground that shows it.

    To tell copies by: a resized picture has the same means up to rounding. (A filter with lobes, as in `square`, moves them
    by 4 levels; block averages do it unless the side is a multiple of `size`.)
    """
    picture = _opened(image)
    centre = square(picture, AVERAGED_SIDE) if is_transparent(picture) else _centre(picture)
    centre = centre.reduce(max(1, centre.width // AVERAGED_SIDE))
    levels, start = np.asarray(centre, np.float32), np.arange(centre.width)
    edges = np.linspace(0, centre.width, size + 1)[:, None]
    inside = np.clip(np.minimum(edges[1:], start + 1) - np.maximum(edges[:-1], start), 0, None)  # size side
    weights = (inside / inside.sum(1, keepdims=True)).astype(np.float32)
    rows = (weights @ levels.reshape(len(levels), -1)).reshape(size, -1, 3)  # size side 3
    means = np.einsum("bt,atc->abc", weights, rows)
    return np.rint(means).clip(0, 255).astype(np.uint8)


def _opened(image: Image.Image) -> Image.Image:
    return image if image.mode in ("RGB", "RGBA") else open_image(image)


def _require_size(size: int) -> None:
    if size < 1:
        raise UsageError(f"expected a size of at least 1 pixel, got {size}: choose the size of the model")


def _centre(picture: Image.Image) -> Image.Image:
    """The centred square, in RGB; resize(box=...) would let the outside bleed in."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).convert("RGB")


def _box(picture: Image.Image, channels: str, ground: Sequence[int]) -> Box | None:
    """The smallest box around all that differs from the ground by more than noise, None where nothing does."""
    boxes = []
    for channel, level in zip(channels, ground, strict=True):
        far = picture.getchannel(channel).point([255 * (abs(other - level) > NOISE) for other in range(256)])
        if (box := far.getbbox()) is not None:
            boxes.append(box)
    if not boxes:
        return None
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _plain_ground(picture: Image.Image) -> Colour | None:
    """The colour that the picture's whole edge has, up to noise; None where it has several."""
    width, height = picture.size
    strips = [(0, 0, width, 1), (0, height - 1, width, height), (0, 0, 1, height), (width - 1, 0, width, height)]
    edge = np.concatenate([np.asarray(picture.crop(strip)).reshape(-1, 3) for strip in strips]).astype(np.int16)
    red, green, blue = np.median(edge, axis=0).astype(int).tolist()
    return (red, green, blue) if np.abs(edge - (red, green, blue)).max() <= NOISE else None


def _placed(picture: Image.Image, box: Box, size: int, ground: tuple[int, ...]) -> Image.Image:
    """What is in the box, its longer side at 15/16 of `size`, in the middle of a frame of that ground."""
    scale = max(1, round(size * 15 / 16)) / longer_side(box)
    width, height = (max(1, round((box[end] - box[end - 2]) * scale)) for end in (2, 3))
    subject = _resized(picture.crop(box), width, height)
    framed = Image.new(picture.mode, (size, size), ground)
    framed.paste(subject, ((size - width) // 2, (size - height) // 2))
    return framed


def _resized(subject: Image.Image, width: int, height: int) -> Image.Image:
    """Colours weighted by their alpha, so that none bleeds in from where nothing is seen; whole numbers average blocks."""
    if subject.size == (width, height):
        resized = subject
    elif (subject.width % width, subject.height % height) == (0, 0):
        resized = subject.reduce((subject.width // width, subject.height // height))
    else:
        weighted = subject.convert("RGBa") if subject.mode == "RGBA" else subject
        resized = weighted.resize((width, height), Image.Resampling.HAMMING, reducing_gap=3.0).convert(subject.mode)
    if resized.mode == "RGBA":
        resized.putalpha(resized.getchannel("A").point([level if level > NOISE else 0 for level in range(256)]))
    return resized
