"""Sheets of many images."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from knn_diffusion.errors import UsageError
from knn_diffusion.images.decode import is_transparent, one_line

LABEL_PIXELS = 12
LABEL_LINES = 3
GAP = 4
CHECK = 8
"""Side in pixels of the grey squares that show through where a picture is transparent."""
CHECK_LEVELS = (255, 225)
TYPOGRAPHY = str.maketrans("–—‘’“”„ßøØæÆłŁ", '--\'\'"""soOaAlL')
"""Signs that have no accent to leave out, and what is drawn in their places."""


def grid(images: Sequence[Image.Image], columns: int, cell: int, labels: Sequence[str] | None = None) -> Image.Image:
    """A white sheet of pictures, row by row, each fitted into `cell` × `cell` pixels, with its label under it.

    Transparent pictures lie on a light checkerboard.

    Labels are wrapped into at most three lines. Raises: UsageError when there is nothing to show, or labels do not match.
    """
    if not images or columns < 1 or cell < 1:
        raise UsageError(
            f"expected images, columns and a cell size, got {len(images)}, {columns} and {cell}: give at least one each"
        )
    if labels is not None and len(labels) != len(images):
        raise UsageError(f"expected one label for each of {len(images)} images, got {len(labels)}: give as many")
    font = ImageFont.load_default(LABEL_PIXELS)
    wrapped = [_wrapped(label, cell, font) for label in labels or [""] * len(images)]
    line_height = LABEL_PIXELS + 3
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [cell + GAP + line_height * max(len(wrapped[number]) for number in row) for row in rows]
    sheet = Image.new("RGB", (columns * (cell + GAP) + GAP, sum(heights) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, number in enumerate(row):
            left = GAP + column * (cell + GAP)
            _paste_fitted(sheet, images[number], left, top, cell)
            for place, line in enumerate(wrapped[number]):
                pen.text((left, top + cell + 1 + place * line_height), line, fill="black", font=font)
        top += height
    return sheet


def _paste_fitted(sheet: Image.Image, image: Image.Image, left: int, top: int, cell: int) -> None:
    """Pixel-exact enlargement where the cell is a whole multiple, so that small pictures are judged as they are."""
    exact = image.width == image.height and cell % image.width == 0
    method = Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS
    layered = image.convert("RGBa") if is_transparent(image) else image.convert("RGB")
    fitted = ImageOps.contain(layered, (cell, cell), method)
    if fitted.mode == "RGBa":
        fitted = Image.alpha_composite(_checkerboard(*fitted.size), fitted.convert("RGBA")).convert("RGB")
    sheet.paste(fitted, (left + (cell - fitted.width) // 2, top + (cell - fitted.height) // 2))


def _checkerboard(width: int, height: int) -> Image.Image:
    rows, columns = np.indices((height, width)) // CHECK
    levels = np.where((rows + columns) % 2 == 0, *CHECK_LEVELS).astype(np.uint8)
    return Image.fromarray(levels).convert("RGBA")


def _wrapped(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines: list[str] = []
    for word in _drawable(one_line(label.replace("\n", " "))).split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return [_shortened(line, width, font) for line in lines[:LABEL_LINES]]


def _drawable(label: str) -> str:
    """The label in letters that the font has: without accents, and other scripts as question marks instead of boxes."""
    plain = unicodedata.normalize("NFKD", label.translate(TYPOGRAPHY))
    return "".join(one for one in plain if not unicodedata.combining(one)).encode("ascii", "replace").decode()


def _shortened(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while line and font.getlength(line) > width:
        line = line[:-1]
    return line
