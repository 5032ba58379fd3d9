"""Stickers to pixels: art tinted, placed, bordered and turned on transparency, then framed."""

from __future__ import annotations

import random

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageFilter

from knn_diffusion.errors import UsageError
from knn_diffusion.images.framing import frame
from knn_diffusion.stickers.art import Art
from knn_diffusion.stickers.compositions import Sticker, Thing, body_in
from knn_diffusion.stickers.tints import tint
from knn_diffusion.stickers.vocabulary import concept_named

DETAIL = 1.5
"""Art is worked on at this many times the size it will have, then averaged down."""
BORDER = 0.045
"""Width of the die-cut border, of the longer side."""
GAPS = (-0.04, 0.08)
"""Distance between two things side by side, of their size; below 0 they touch."""
OVERLAPS = (0.3, 0.45)
SIZES = (0.75, 1.0)


def trimmed(image: Image.Image) -> Image.Image:
    """The picture without what is transparent around it."""
    box = image.getchannel("A").point(lambda level: 255 if level > 8 else 0).getbbox()
    return image.crop(box) if box else image


def fitted(image: Image.Image, longer: int) -> Image.Image:
    """The picture trimmed, with its longer side at `longer`."""
    image = trimmed(image)
    scale = longer / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


Mask = Bool[np.ndarray, "height width"]


def _grown(mask: Mask, width: int) -> Mask:
    """All within `width` pixels of the mask: the union of a disc's rows."""
    grown = np.zeros_like(mask)
    for down in range(-width, width + 1):
        half = int((width**2 - down**2) ** 0.5)
        row = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur((half, 0)))
        grown |= np.roll(np.asarray(row) > 0, down, 0)
    return grown


def _filled(mask: Mask) -> Mask:
    """The mask with its holes: all that cannot be reached from the corner around it."""
    outside = np.zeros_like(mask)
    outside[0, :] = outside[-1, :] = outside[:, 0] = outside[:, -1] = True
    reached = 0
    while outside.sum() != reached:
        reached = outside.sum()
        for _ in range(8):
            outside[1:] |= outside[:-1]
            outside[:-1] |= outside[1:]
            outside[:, 1:] |= outside[:, :-1]
            outside[:, :-1] |= outside[:, 1:]
            outside &= ~mask
    return ~outside


def cut_out(image: Image.Image) -> Image.Image:
    """The picture with a white border around its outline, holes filled, as a printed sticker is cut."""
    width = max(2, round(BORDER * max(image.size)))
    padded = Image.new("RGBA", (image.width + 4 * width, image.height + 4 * width))
    padded.paste(image, (2 * width, 2 * width))
    cut = _filled(_grown(np.asarray(padded.getchannel("A")) > 64, width))
    soft = Image.fromarray((cut * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    paper = Image.new("RGBA", padded.size, (255, 255, 255, 0))
    paper.putalpha(soft)
    return Image.alpha_composite(paper, padded)


def _object(thing: Thing, family: str, longer: int, art: Art) -> Image.Image:
    image = fitted(art.picture(concept_named(thing.concept), family), longer)
    body = body_in(art, thing.concept, family) if thing.tint else None
    return tint(image, thing.tint, body) if thing.tint and body is not None else image


def _joined(sticker: Sticker, longer: int, art: Art) -> Image.Image:
    """Two things in their relation: the first stands at `relation` of the second."""
    rng = random.Random(f"placing {sticker.seed}")
    sizes = [round(longer * rng.uniform(*SIZES)) for _ in range(2)]
    first, second = (
        _object(thing, sticker.family, size, art) for thing, size in zip(sticker.things, sizes, strict=True)
    )
    canvas = Image.new("RGBA", (4 * longer, 4 * longer))
    middle = 2 * longer
    gap = rng.uniform(*GAPS) * longer
    aside, down = (first.width + second.width) / 2 + gap, (first.height + second.height) / 2 + gap
    lean = rng.uniform(-0.08, 0.08) * longer
    side = rng.choice((-1, 1))
    overlap = 1 - rng.uniform(*OVERLAPS)
    place = {
        "left of": (-aside, lean), "right of": (aside, lean), "above": (lean, -down), "below": (lean, down),
        "in front of": (side * aside * overlap * 0.75, down * overlap * 0.6),
    }[sticker.relation or "left of"]  # fmt: skip
    for image, (x, y) in ((second, (0.0, 0.0)), (first, place)):
        corner = (round(middle + x - image.width / 2), round(middle + y - image.height / 2))
        canvas.alpha_composite(image, corner)
    return trimmed(canvas)


def _with_margin(image: Image.Image) -> Image.Image:
    """The picture with transparency around it, so that art that fills a rectangle is framed as a sticker too."""
    wider = Image.new("RGBA", (image.width + 2, image.height + 2))
    wider.paste(image, (1, 1))
    return wider


def compose(sticker: Sticker, size: int, art: Art) -> Image.Image:
    """The sticker as a framed RGBA picture of `size` × `size` pixels.

    Raises: UsageError when size is below 8 or the art lacks a thing.
    """
    if size < 8:
        raise UsageError(f"expected a sticker size of at least 8 pixels, got {size}: choose 128")
    longer = round(DETAIL * size)
    if len(sticker.things) == 2:
        image = _joined(sticker, round(longer * 0.6), art)
    else:
        image = _object(sticker.things[0], sticker.family, longer, art)
    if sticker.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if sticker.turned:
        image = trimmed(image.rotate(sticker.turned, Image.Resampling.BICUBIC, expand=True))
    return frame(_with_margin(cut_out(image) if sticker.bordered else image), size)
