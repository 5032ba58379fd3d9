"""Scenes to pixels: backdrop, tinted and outlined glyphs, placed by the scene's relation."""

from __future__ import annotations

import colorsys
import functools
import math
import random

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from knn_diffusion.errors import UsageError
from knn_diffusion.stickers.glyphs import GlyphSource
from knn_diffusion.stickers.scenes import Scene, Thing

HUE_SATURATION_VALUE = {
    "red": (0.00, 0.85, 0.88), "orange": (0.075, 0.90, 1.00), "yellow": (0.15, 0.75, 1.00), "green": (0.36, 0.70, 0.72),
    "teal": (0.49, 0.75, 0.72), "blue": (0.60, 0.75, 0.95), "purple": (0.77, 0.60, 0.78), "pink": (0.92, 0.42, 1.00),
    "white": (0.00, 0.00, 1.00), "grey": (0.00, 0.00, 0.58), "black": (0.00, 0.00, 0.10),
}  # fmt: skip
SPOTS: dict[str | None, tuple[tuple[float, float], ...]] = {
    None: ((0.5, 0.5), (0.5, 0.5)),
    "left of": ((0.27, 0.5), (0.73, 0.5)),
    "right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
    "in front of": ((0.38, 0.63), (0.65, 0.35)),
}
ALONE, PAIRED = (0.58, 0.80), (0.42, 0.50)
JITTER = 0.03
SMALLEST_WORK = 128
LUMA = np.array([0.299, 0.587, 0.114], np.float32)

Colour = tuple[int, int, int]


def shade(name: str, rng: random.Random | None = None) -> Colour:
    """RGB in 0…255 of a named colour; with a generator one of its shades."""
    hue, saturation, value = HUE_SATURATION_VALUE[name]
    if rng is not None:
        hue += rng.uniform(-0.015, 0.015)
        saturation = min(1.0, saturation * rng.uniform(0.85, 1.1))
        value = min(1.0, value * rng.uniform(0.88, 1.08))
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


@functools.lru_cache(maxsize=8)
def _axes(size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    return x, y


def _pattern(kind: str, size: int, rng: random.Random) -> np.ndarray:
    """How far each pixel leans to the second shade, 0…1."""
    x, y = _axes(size)
    repeats = rng.choice((4, 6, 8))
    if kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        slope = x * math.cos(angle) + y * math.sin(angle)
        return (slope - slope.min()) / (np.ptp(slope) + 1e-6)
    if kind == "spotlight":
        distance = np.hypot(x - rng.uniform(0.35, 0.65), y - rng.uniform(0.35, 0.65))
        return np.minimum(distance * 1.5, 1)
    if kind == "dotted":
        return np.hypot(x * repeats % 1 - 0.5, y * repeats % 1 - 0.5) < 0.26
    if kind == "striped":
        angle = rng.choice((0.0, math.pi / 4, math.pi / 2))
        return (x * math.cos(angle) + y * math.sin(angle)) * repeats % 1 < 0.5
    if kind == "checked":
        return (np.floor(x * repeats) + np.floor(y * repeats)) % 2
    if kind == "speckled":
        cells = np.random.default_rng(rng.getrandbits(32)).random((64, 64), dtype=np.float32)
        return np.asarray(Image.fromarray(cells).resize((size, size), Image.Resampling.NEAREST))
    return np.zeros_like(x)


def _second_shade(first: np.ndarray) -> np.ndarray:
    """The pattern's other colour: darker, or lighter than black; near enough to keep the colour's name."""
    lightness = float(first @ LUMA)
    if lightness < 60:
        return first + 38
    return first * (0.84 if lightness > 215 else 0.74)


def _backdrop(scene: Scene, size: int, rng: random.Random) -> Image.Image:
    first = np.array(shade(scene.background_colour, rng), np.float32)
    lean = _pattern(scene.background, size, rng)
    ramp = first + (_second_shade(first) - first) * (np.arange(256, dtype=np.float32)[:, None] / 255)
    levels = (lean * np.float32(255)).astype(np.uint8)
    return Image.fromarray(ramp.astype(np.uint8)[levels], "RGB")


def recolour(glyph: Image.Image, name: str) -> Image.Image:
    """The glyph in a named colour: each pixel keeps its lightness and takes the colour's hue and saturation."""
    pixels = np.asarray(glyph)
    light = np.arange(256, dtype=np.float32)[:, None] / 255
    full = np.array(shade(name), np.float32)
    dark, pale = full * 0.15, full + (255 - full) * 0.75
    ramp = np.where(light < 0.6, dark + (full - dark) * (light / 0.6), full + (pale - full) * ((light - 0.6) / 0.4))
    levels = (pixels[..., :3].astype(np.float32) @ LUMA).astype(np.uint8)
    body = np.clip(ramp, 0, 255).astype(np.uint8)[levels]
    return Image.fromarray(np.concatenate([body, pixels[..., 3:]], axis=-1), "RGBA")


def cut_out(glyph: Image.Image, width: int) -> Image.Image:
    """The glyph with the white border and the soft shadow of a printed sticker, `width` pixels broad."""
    pad = 3 * width
    inner = Image.new("RGBA", (glyph.width + 2 * pad, glyph.height + 2 * pad), (255, 255, 255, 0))
    inner.paste(glyph, (pad, pad))
    ink = inner.getchannel("A").point(lambda level: 255 if level > 96 else 0)
    border = ink.filter(ImageFilter.BoxBlur(width)).point(lambda level: min(255, level * 8))
    shadow = ImageChops.offset(border, width // 2, width // 2).filter(ImageFilter.BoxBlur(width))
    under = Image.new("RGBA", inner.size, (0, 0, 0, 0))
    under.putalpha(shadow.point(lambda level: level // 3))
    under.paste((255, 255, 255, 255), mask=border)
    return Image.alpha_composite(under, inner)


@functools.lru_cache(maxsize=4096)
def _coloured(glyphs: GlyphSource, char: str, tint: str | None) -> Image.Image:
    glyph = glyphs(char)
    return recolour(glyph, tint) if tint else glyph


def _prepared(thing: Thing, longest: float, work: int, glyphs: GlyphSource) -> Image.Image:
    glyph = _coloured(glyphs, thing.char, thing.tint)
    scale = longest / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    glyph = glyph.resize(size, Image.Resampling.BICUBIC)
    if thing.flipped:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if thing.turned == 180:
        glyph = glyph.transpose(Image.Transpose.ROTATE_180)
    elif thing.turned:
        glyph = glyph.rotate(thing.turned, Image.Resampling.BICUBIC, expand=True)
    return cut_out(glyph, max(2, work // 42)) if thing.outlined else glyph


def draw(scene: Scene, size: int, glyphs: GlyphSource) -> Image.Image:
    """The scene as an RGB picture of `size` × `size` pixels.

    Small pictures are drawn at twice their size or more and averaged down. Raises: UsageError when size is below 8.
    """
    if size < 8:
        raise UsageError(f"expected a picture size of at least 8 pixels, got {size}: choose 64")
    factor = max(1, math.ceil(SMALLEST_WORK / size))
    work = size * factor
    rng = random.Random(f"placing {scene.seed}")
    canvas = _backdrop(scene, work, rng)
    low, high = ALONE if len(scene.things) == 1 else PAIRED
    placed = []
    for thing, (x, y) in zip(scene.things, SPOTS[scene.relation], strict=False):
        share = rng.uniform(low, high) * (1.15 if scene.relation == "in front of" else 1)
        picture = _prepared(thing, share * work, work, glyphs)
        left = round((x + rng.uniform(-JITTER, JITTER)) * work - picture.width / 2)
        top = round((y + rng.uniform(-JITTER, JITTER)) * work - picture.height / 2)
        placed.append((picture, (left, top)))
    for picture, place in reversed(placed):
        canvas.paste(picture, place, picture)
    return canvas.reduce(factor) if factor > 1 else canvas
