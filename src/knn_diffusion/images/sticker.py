"""A drawing becomes a sticker: size, ground, die-cut border and shadow, composed at the final resolution."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypedDict

from PIL import Image, ImageColor

from knn_diffusion.errors import UsageError
from knn_diffusion.images.decode import NOISE, is_transparent
from knn_diffusion.images.framing import Colour
from knn_diffusion.images.outline import grown, shadow
from knn_diffusion.images.resize import RESAMPLERS, Resampler, resized

MIN_SIZE, MAX_SIZE = 16, 4096
BORDER = 0.03
"""Width of the border where none is named, as a share of the side: just what a framed picture leaves free."""
MAX_BORDER = 0.2
BORDER_COLOUR: Colour = (255, 255, 255)
SHADOW_DOWN, SHADOW_BLUR, SHADOW_STRENGTH = 0.012, 0.012, 0.4
"""How far the shadow lies below, how far it is blurred (both as shares of the side), and how dark it is."""
SHADOW_REACH = 2.5 * SHADOW_BLUR
"""Further out nothing of it is seen."""


class Finishing(TypedDict, total=False):
    """How drawings are finished; what is left out stays as it was drawn."""

    size: int | None
    """Side in pixels, 16 … 4096."""
    background: str | None
    """A CSS colour name or #rrggbb. "none" keeps the ground that was drawn; "transparent" does too, and refuses opaque drawings."""
    border: bool | float
    """A white die-cut border: its width as a share of the side, up to 0.2; True is 0.03."""
    shadow: bool
    """A soft shadow below."""
    resampler: Resampler
    """"crisp" or "lanczos"; "auto" is crisp for drawings with transparency and Lanczos for opaque ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """Checked `Finishing`.

    size        side in pixels; None keeps the drawing's
    background  colour behind the drawing; None keeps what was drawn
    see_through whether the drawing must have transparency
    border      width of the border as a share of the side; 0 is no border
    shadow      whether there is a shadow
    resampler   how pixels are enlarged
    """

    size: int | None = None
    background: Colour | None = None
    see_through: bool = False
    border: float = 0.0
    shadow: bool = False
    resampler: Resampler = "auto"

    @property
    def needs_transparency(self) -> bool:
        """True if an opaque drawing makes no sense: what is behind it could not be seen."""
        return self.see_through or (self.background is not None and not self.border and not self.shadow)

    @property
    def plain(self) -> bool:
        """True if drawings stay as they are."""
        return self.size is None and self.background is None and not self.border and not self.shadow

    def facts(self) -> dict[str, Any]:
        """What is not left as drawn, as plain values."""
        background = None if self.background is None else css(self.background)
        facts = {"size": self.size, "background": background, "border": self.border, "shadow": self.shadow}
        return {name: value for name, value in facts.items() if value}


def check_finish(options: Finishing) -> Finish:
    """The checked options.

    Raises: UsageError naming the option, its rule and what came; TypeError for an option that does not exist.
    """
    unknown = sorted(options.keys() - Finishing.__annotations__.keys())
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(Finishing.__annotations__)}")
    background = options.get("background") or "none"
    resampler = options.get("resampler", "auto")
    if resampler not in RESAMPLERS:
        raise UsageError(f"expected resampler as one of {', '.join(RESAMPLERS)}, got {resampler!r}: choose one of them")
    return Finish(
        size=_size(options.get("size")),
        background=None if background in ("none", "transparent") else _colour(background),
        see_through=background == "transparent",
        border=_border(options.get("border", False)),
        shadow=bool(options.get("shadow", False)),
        resampler=resampler,
    )


def finished(image: Image.Image, finish: Finish) -> Image.Image:
    """The sticker of a drawing, a square of `finish.size` pixels.

    The drawing is enlarged to the whole square and keeps its place. Where border and shadow would be cut off, it is moved and
    made smaller, as little as that takes. The result is RGBA, or RGB where it covers its whole square.

    Args: image: RGB or RGBA.
    Raises: UsageError for an opaque drawing where it would hide the ground that is asked for.
    """
    check_ground(image, finish)
    if finish.plain:
        return image
    side = finish.size or max(image.size)
    if image.mode == "RGB" and image.width == image.height and not finish.border and not finish.shadow:
        return resized(image, side, side, finish.resampler)
    art = placed(image, finish, side)
    shape = grown(art.getchannel("A"), finish.border * side) if finish.border else art.getchannel("A")
    sticker = Image.new("RGBA", art.size, (*(finish.background or (0, 0, 0)), 255 * (finish.background is not None)))
    if finish.shadow:
        sticker.alpha_composite(
            _filled((0, 0, 0), shadow(shape, SHADOW_DOWN * side, SHADOW_BLUR * side, SHADOW_STRENGTH))
        )
    if finish.border:
        sticker.alpha_composite(_filled(BORDER_COLOUR, shape))
    sticker.alpha_composite(art)
    return sticker if finish.background is None else sticker.convert("RGB")


def check_ground(image: Image.Image, finish: Finish) -> None:
    """Raise a UsageError where an opaque drawing would hide the ground that is asked for."""
    if finish.needs_transparency and not is_transparent(image):
        raise UsageError(OPAQUE)


OPAQUE = (
    "expected drawings with transparency for a background, got opaque ones: leave it out, add a border, or choose a model "
    "that draws transparent stickers"
)


def placed(image: Image.Image, finish: Finish, side: int) -> Image.Image:
    """The drawing in RGBA on a transparent square of that side, with room for border and shadow."""
    width, height, left, top = _place(image, finish, side)
    art = resized(image, width, height, finish.resampler).convert("RGBA")
    if (width, height, left, top) == (side, side, 0, 0):
        return art
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(art, (left, top))
    return canvas


def _place(image: Image.Image, finish: Finish, side: int) -> tuple[int, int, int, int]:
    """Width, height, left and top of the drawing on a square of that side."""
    seen = _seen(image)
    left, above, right, below = _room(finish, side)
    whole = side / max(image.size)
    across, down = (side - left - right - 1) / (seen[2] - seen[0]), (side - above - below - 1) / (seen[3] - seen[1])
    for share in (whole, min(whole, across, down)):  # a pixel less, so that a whole pixel can be where it begins
        width, height = (max(1, math.floor(length * share + 1e-6)) for length in image.size)
        x = _start(side, width, width / image.width, (seen[0], seen[2]), (left, right))
        y = _start(side, height, height / image.height, (seen[1], seen[3]), (above, below))
        if x is not None and y is not None:
            break
    return width, height, x or 0, y or 0


def _room(finish: Finish, side: int) -> tuple[float, float, float, float]:
    """Pixels that border and shadow take to the left, above, to the right and below."""
    border = finish.border * side + 0.5 if finish.border else 0.0
    blur = SHADOW_REACH * side if finish.shadow else 0.0
    down = SHADOW_DOWN * side if finish.shadow else 0.0
    return border + blur, border + max(0.0, blur - down), border + blur, border + blur + down


def _seen(image: Image.Image) -> tuple[int, int, int, int]:
    """The box around all that can be seen."""
    whole = (0, 0, image.width, image.height)
    if image.mode != "RGBA":
        return whole
    return image.getchannel("A").point([255 * (level > NOISE) for level in range(256)]).getbbox() or whole


def _start(side: int, length: int, scale: float, seen: tuple[int, int], room: tuple[float, float]) -> int | None:
    """Where a drawing of this length begins, in the middle if it can, so that what is seen of it has room before and after.

    None where no whole pixel does.
    """
    least, most = math.ceil(room[0] - seen[0] * scale), math.floor(side - room[1] - seen[1] * scale)
    return min(max(round((side - length) / 2), least), most) if least <= most else None


def _filled(colour: Colour, alpha: Image.Image) -> Image.Image:
    layer = Image.new("RGBA", alpha.size, (*colour, 0))
    layer.putalpha(alpha)
    return layer


def css(colour: Colour) -> str:
    """A colour as #rrggbb."""
    return "#" + "".join(f"{level:02x}" for level in colour)


def _size(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_SIZE <= value <= MAX_SIZE:
        raise UsageError(f"expected size from {MIN_SIZE} to {MAX_SIZE} pixels, got {value!r}: choose another")
    return value


def _border(value: object) -> float:
    if isinstance(value, bool):
        return BORDER if value else 0.0
    if not isinstance(value, int | float) or not 0 <= value <= MAX_BORDER:
        raise UsageError(
            f"expected a border from 0 to {MAX_BORDER:g} of the side, got {value!r}: {BORDER:g} is the usual width"
        )
    return float(value)


def _colour(name: object) -> Colour:
    parts: tuple[int, ...] = ()
    with suppress(ValueError):
        parts = ImageColor.getrgb(str(name))
    if len(parts) != 3:
        raise UsageError(
            f"expected background as none, transparent, a CSS colour name or #rrggbb, got {name!r}: choose one, such as teal"
        )
    return parts[0], parts[1], parts[2]
