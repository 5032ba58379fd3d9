"""What is odd about an image that is used all the same, so that nothing happens to it without a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from knn_diffusion import images as pictures

Hint = Literal["first_of_several", "small", "cropped", "sheet"]

HINTS: dict[Hint, str] = {
    "first_of_several": "animated or paged files, of which the first picture is used",
    "small": "pictures of less than 32 pixels, which are enlarged",
    "cropped": "opaque pictures that are not square, of which the middle is used",
    "sheet": "pictures that look like sheets of several stickers: cut them apart, since each is one image here",
}
"""What to tell of all images with a hint, before their number."""

SMALL = 32
"""Pixels of the longer side of what a picture shows."""
CROPPED = 1.1
"""Times as long as wide, from which on a picture loses something when only its middle is used."""
LOOKED_AT = 64
"""Side in pixels at which the parts of a picture are told apart."""
PARTS = 4
"""Separate parts of similar size that make a sheet. Of 1,000 emoji of four sets, 4 have as many."""
VISIBLE = 32
"""Levels of 255 by which a part differs from its ground."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hinted:
    """How many images have a hint, and where the first of them came from."""

    count: int
    first: str


def hints_of(image: Image.Image, framed: Image.Image) -> tuple[Hint, ...]:
    """What there is to tell of a picture.

    Args: framed: the same picture as `images.frame` gives it.
    """
    subject = pictures.subject(image)
    longer, shorter = max(image.size), min(image.size)
    shown = shorter if subject is None else pictures.longer_side(subject[0])
    found: list[tuple[Hint, bool]] = [
        ("first_of_several", bool(image.info.get(pictures.OF_SEVERAL))),
        ("small", shown < SMALL),
        ("cropped", subject is None and longer > CROPPED * shorter),
        ("sheet", subject is not None and num_parts(framed) >= PARTS),
    ]
    return tuple(hint for hint, applies in found if applies)


def num_parts(framed: Image.Image) -> int:
    """Number of separate parts of a framed picture that are at least half as long as the longest."""
    small = np.asarray(framed.resize((LOOKED_AT, LOOKED_AT), Image.Resampling.BOX), np.int16)
    drawn = small[..., 3] > VISIBLE if framed.mode == "RGBA" else np.abs(small - small[0, 0]).max(-1) > VISIBLE
    labels = _parts(drawn)
    places = [np.argwhere(labels == one) for one in np.unique(labels[drawn])]
    sides = np.array([np.ptp(place, axis=0).max() + 1 for place in places])
    return int((sides >= sides.max(initial=0) / 2).sum())


def _parts(drawn: Bool[np.ndarray, "height width"]) -> Int[np.ndarray, "height width"]:
    """A number for each place, the same for those that touch, also at a corner; the largest where nothing is drawn."""
    nothing = drawn.size
    labels = np.where(drawn, np.arange(nothing).reshape(drawn.shape), nothing)
    while True:
        padded = np.pad(labels, 1, constant_values=nothing)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
        least = np.where(drawn, windows.min((2, 3)), nothing)
        least = np.append(least.ravel(), nothing)[least]  # a place takes what its label's own place has found
        if np.array_equal(least, labels):
            return labels
        labels = least
