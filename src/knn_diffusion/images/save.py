"""Generated images on disk, with how they were made inside the file, and sheets of many."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from knn_diffusion.checkpoint import atomic_write_bytes
from knn_diffusion.config import parse_json
from knn_diffusion.errors import ImageError, UsageError
from knn_diffusion.images.decode import one_line, open_checked

CHUNK = "knn_diffusion"
PARAMETERS = (
    ("Steps", ("steps", "num_inference_steps")),
    ("Sampler", ("sampler",)),
    ("CFG scale", ("guidance_scale",)),
    ("Seed", ("seed",)),
    ("Model", ("model",)),
    ("K", ("k",)),
)
LABEL_PIXELS = 12
LABEL_LINES = 3
GAP = 4
CHECKS = (255, 225)
CHECK_PIXELS = 8
"""Levels and side of the squares that are seen through transparent pictures."""
TYPOGRAPHY = str.maketrans("–—‘’“”„ßøØæÆłŁ", '--\'\'"""soOaAlL')
"""Signs that have no accent to leave out, and what is drawn in their places."""


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The text that Stable Diffusion web UIs and image browsers show: the prompt, then one line of settings."""
    named = [(label, next((settings[key] for key in keys if key in settings), None)) for label, keys in PARAMETERS]
    line = ", ".join(f"{label}: {value}" for label, value in named if value is not None)
    text = "\n".join(part for part in (str(settings.get("prompt", "")), line) if part)
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a PNG that holds its settings, as readable text (`parameters`) and as JSON (`knn_diffusion`).

    Args: settings: JSON-like facts; prompt, steps, sampler, guidance_scale, seed, model and k also go into the text.
    Raises: KnnDiffusionError when the disk is full or not writable; then nothing half-written is left.
    """
    chunks = PngImagePlugin.PngInfo()
    if settings:
        chunks.add_text("parameters", parameters_text(settings))
        chunks.add_text(CHUNK, json.dumps(dict(settings), default=str))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    atomic_write_bytes(Path(path), buffer.getvalue())


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings inside an image this package wrote; empty for any other image.

    Raises: ImageError when the file is no readable image.
    """
    try:
        with open_checked(Path(path)) as image:
            settings = parse_json(image.info.get(CHUNK, "{}"))
    except Exception as error:
        raise ImageError(
            f"expected an image with settings, {one_line(path)} cannot be read ({one_line(error)}): check it"
        ) from None
    return settings if isinstance(settings, dict) else {}


def grid(images: Sequence[Image.Image], columns: int, cell: int, labels: Sequence[str] | None = None) -> Image.Image:
    """A white sheet of pictures, row by row, each fitted into `cell` × `cell` pixels, with its label under it.

    Transparent pictures lie on a light checkerboard. Labels are wrapped into at most three lines. Raises: UsageError when there is nothing to show, or labels do not match.
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
    fitted = ImageOps.contain(image if image.mode == "RGBA" else image.convert("RGB"), (cell, cell), method)
    if fitted.mode == "RGBA":
        fitted = Image.alpha_composite(_checkerboard(fitted.size), fitted)
    sheet.paste(fitted, (left + (cell - fitted.width) // 2, top + (cell - fitted.height) // 2))


def _checkerboard(size: tuple[int, int]) -> Image.Image:
    across, down = (np.arange(side) // CHECK_PIXELS for side in size)
    levels = np.where((across[None] + down[:, None]) % 2 == 0, *CHECKS).astype(np.uint8)
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
    """In the letters that the font has: accents are left out, and other scripts are question marks instead of boxes."""
    plain = unicodedata.normalize("NFKD", label.translate(TYPOGRAPHY))
    return "".join(one for one in plain if not unicodedata.combining(one)).encode("ascii", "replace").decode()


def _shortened(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while line and font.getlength(line) > width:
        line = line[:-1]
    return line
