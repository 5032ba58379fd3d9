"""A drawing as SVG, crisp at any size: flat shapes traced by vtracer, with ground, shadow and border as shapes of their own.

For flat art: shadings become steps, and what is half transparent becomes solid or nothing.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from knn_diffusion.errors import MissingDependencyError
from knn_diffusion.images.outline import grown
from knn_diffusion.images.sticker import (
    BORDER_COLOUR,
    SHADOW_BLUR,
    SHADOW_DOWN,
    SHADOW_STRENGTH,
    Finish,
    check_ground,
    css,
    placed,
)

SIDE = 512
"""Side of the picture that is traced, and of the coordinates of the SVG."""
NUM_COLOURS = 24
SPECKLE = 6
"""Patches smaller than the square of this many pixels are left out."""
TRACING: dict[str, Any] = {
    "mode": "spline",
    "hierarchical": "stacked",
    "filter_speckle": SPECKLE,
    "layer_difference": 16,
    "length_threshold": 6.0,
    "path_precision": 1,
}
_SHAPE = re.compile(
    r'<path d="(?P<line>[MLCZ0-9eE.,+\s-]+)" fill="(?P<fill>#[0-9A-Fa-f]{6})"'
    r' transform="translate\((?P<x>[0-9eE.+-]+),(?P<y>[0-9eE.+-]+)\)"\s*/>'
)


def require_tracing() -> None:
    """Raise a MissingDependencyError where vtracer is not installed."""
    try:
        import vtracer  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "expected vtracer to trace a drawing as SVG, it is missing: pip install 'knn-diffusion[svg]'"
        ) from None


def traced(image: Image.Image, finish: Finish, settings: Mapping[str, Any] | None = None) -> str:
    """The sticker of a drawing as SVG.

    Args:
        image: RGB or RGBA.
        finish: its size is the SVG's width and height, which viewers may change; the resampler plays no part.
        settings: JSON-like facts for the <metadata>.
    Raises: MissingDependencyError without vtracer; UsageError for an opaque drawing where it would hide the ground.
    """
    require_tracing()
    check_ground(image, finish)
    art = placed(image, replace(finish, resampler="crisp"), SIDE)
    solid = _solid(art.getchannel("A").filter(ImageFilter.MedianFilter(3)))
    shape = _solid(grown(solid, finish.border * SIDE)) if finish.border else solid
    outline = (
        _shapes(ImageOps.invert(shape).convert("RGB"), colormode="binary") if finish.border or finish.shadow else []
    )
    side = finish.size or max(image.size)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" viewBox="0 0 {SIDE} {SIDE}">',
        *_metadata(settings),
        *_behind(outline, finish),
        *(f'<path fill="{fill}"{at} d="{line}"/>' for fill, at, line in _shapes(_flat(image, art, solid))),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


Shape = tuple[str, str, str]
"""Fill, place and line of a path."""


def _shapes(picture: Image.Image, **options: Any) -> list[Shape]:
    """The traced shapes, each to be drawn over those before it."""
    import vtracer

    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    svg = vtracer.convert_raw_image_to_svg(content.getvalue(), img_format="png", **TRACING, **options)
    return [
        (found["fill"].lower(), _moved(found["x"], found["y"]), found["line"].strip()) for found in _SHAPE.finditer(svg)
    ]


def _moved(x: str, y: str) -> str:
    return "" if float(x) == 0 and float(y) == 0 else f' transform="translate({float(x):g} {float(y):g})"'


def _solid(alpha: Image.Image) -> Image.Image:
    """Alpha that is all or nothing."""
    return alpha.point([255 * (level > 127) for level in range(256)])


def _behind(outline: list[Shape], finish: Finish) -> list[str]:
    """What lies under the drawing: ground, shadow, border."""
    lines = "".join(f'<path{at} d="{line}"/>' for _, at, line in outline)
    parts = []
    if finish.background is not None:
        parts.append(f'<rect width="{SIDE}" height="{SIDE}" fill="{css(finish.background)}"/>')
    if finish.shadow:
        parts.append(
            '<filter id="soft" x="-20%" y="-20%" width="140%" height="140%">'
            f'<feGaussianBlur stdDeviation="{SHADOW_BLUR * SIDE:g}"/></filter>\n'
            f'<g filter="url(#soft)" opacity="{SHADOW_STRENGTH:g}" transform="translate(0 {SHADOW_DOWN * SIDE:g})">'
            f"{lines}</g>"
        )
    if finish.border:
        parts.append(f'<g fill="{css(BORDER_COLOUR)}">{lines}</g>')
    return parts


def _flat(image: Image.Image, art: Image.Image, solid: Image.Image) -> Image.Image:
    """The enlarged drawing in a few colours, each pixel solid or nothing: without it every shading is a dozen ribbons."""
    levels = np.asarray(image.convert("RGBA"))
    seen = levels[levels[..., 3] > 127][:, :3]
    if not len(seen):
        return Image.new("RGBA", art.size)
    palette = Image.fromarray(seen[None]).quantize(NUM_COLOURS, method=Image.Quantize.MEDIANCUT, kmeans=2)
    nearest = art.convert("RGB").filter(ImageFilter.MedianFilter(3)).quantize(palette=palette, dither=Image.Dither.NONE)
    numbers = np.asarray(Image.fromarray(np.asarray(nearest)).filter(ImageFilter.ModeFilter(5)))
    colours = np.array((palette.getpalette() or []) + [0] * 768, np.uint8)[:768].reshape(-1, 3)
    flat = np.dstack([colours[numbers], np.asarray(solid)])
    flat[flat[..., 3] == 0] = 0
    return Image.fromarray(flat)


def _metadata(settings: Mapping[str, Any] | None) -> list[str]:
    """ASCII only: what XML cannot hold, such as control characters, are escapes of JSON."""
    if not settings:
        return []
    return [f'<metadata id="knn_diffusion">{escape(json.dumps(dict(settings), default=str))}</metadata>']
