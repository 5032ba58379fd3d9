"""Sticker art for the tests: plain shapes under the names of real icons, drawn without any package."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from knn_diffusion.stickers.art import Art, open_art

SHAPES = {
    "octopus": (220, 60, 60), "rocket": (60, 90, 220), "dog-face": (200, 140, 60), "ghost": (240, 240, 240),
    "pineapple": (230, 190, 40), "penguin": (30, 30, 34), "garlic": (230, 225, 210), "balloon": (210, 30, 40),
    "key": (240, 200, 60), "red-heart": (220, 20, 40), "no-entry": (210, 10, 20), "guitar": (190, 70, 40),
}  # fmt: skip
FAMILIES = ("noto", "twemoji", "emojione")


def shape(colour: tuple[int, int, int], side: int = 64) -> Image.Image:
    """A disc with two dark eyes and a pale mouth, on transparency, off the middle."""
    image = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(image)
    pen.ellipse((side * 0.2, side * 0.1, side * 0.9, side * 0.8), fill=(*colour, 255))
    for x in (0.4, 0.65):
        pen.ellipse((side * x, side * 0.3, side * (x + 0.08), side * 0.38), fill=(70, 40, 20, 255))
    pen.rectangle((side * 0.45, side * 0.6, side * 0.65, side * 0.66), fill=(255, 255, 255, 255))
    return image


def make_art(folder: Path) -> Art:
    """The shapes in three families of training and in the held-out one."""
    for family in (*FAMILIES, "openmoji"):
        (folder / family).mkdir(parents=True)
        for icon, colour in SHAPES.items():
            shape(colour).save(folder / family / f"{icon}.png")
    return open_art(folder)
