"""Where glyphs come from: the colour emoji font, or a folder of pictures for machines without it.

A glyph source is any callable from an emoji's characters to an RGBA picture cropped to its ink.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from knn_diffusion.errors import MissingDependencyError, UsageError

GlyphSource = Callable[[str], Image.Image]
"""Emoji characters -> RGBA picture cropped to its ink; the picture is shared and must not be changed."""

STRIKE_PIXELS = 109
"""The only size in a bitmap (CBDT) colour font; FreeType refuses every other."""

CELL = (136, 128)

FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/Library/Fonts/NotoColorEmoji.ttf",
    "/Library/Fonts/NotoColorEmoji.ttf",
)

INSTALL_FONT = (
    "install it (Debian, Ubuntu: apt install fonts-noto-color-emoji; macOS: brew install --cask font-noto-color-emoji; "
    "elsewhere: the bitmap NotoColorEmoji.ttf of github.com/googlefonts/noto-emoji) or give its path"
)


def find_font(path: str | Path | None = None) -> Path:
    """The font file at `path`, or the first of the usual places.

    Raises: MissingDependencyError saying how to install the font.
    """
    for name in FONT_PLACES if path is None else (str(path),):
        place = Path(os.path.expanduser(name))
        if place.is_file():
            return place
    where = "the usual places" if path is None else str(path)
    raise MissingDependencyError(f"expected the font Noto Color Emoji, found none at {where}: {INSTALL_FONT}")


@functools.lru_cache(maxsize=4)
def _open_font(path: Path) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise MissingDependencyError(
            "expected Pillow with raqm for joined emoji, this Pillow lacks it: pip install --force-reinstall pillow"
        )
    try:
        return ImageFont.truetype(str(path), STRIKE_PIXELS, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise MissingDependencyError(
            f"expected a bitmap colour font, {path} is not one ({error}): {INSTALL_FONT}"
        ) from None


@functools.lru_cache(maxsize=4096)
def _font_glyph(path: Path, char: str) -> Image.Image:
    cell = Image.new("RGBA", CELL, (0, 0, 0, 0))
    ImageDraw.Draw(cell).text((0, 0), char, font=_open_font(path), embedded_color=True)
    box = cell.getbbox()
    if box is None:
        raise UsageError(f"expected an emoji, {path.name} draws nothing for {char!r}: choose one of concepts()")
    return cell.crop(box)


@dataclass(frozen=True)
class FontGlyphs:
    """Glyphs drawn from Noto Color Emoji; without a path the font is searched for in the usual places."""

    path: Path

    def __init__(self, path: str | Path | None = None) -> None:
        object.__setattr__(self, "path", find_font(path))

    def __call__(self, char: str) -> Image.Image:
        """The glyph of `char`. Raises: UsageError when the font has none."""
        return _font_glyph(self.path, char)

    def is_one_glyph(self, char: str) -> bool:
        """Whether the font draws the sequence as one picture; one newer than the font falls apart into several."""
        return bool(_open_font(self.path).getlength(char) <= CELL[0] + 4)

    @property
    def digest(self) -> str:
        """SHA-256 of the font file."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def glyph_file_name(char: str) -> str:
    """File name of one glyph in a folder of glyphs: its code points in hexadecimal, as 1f34d.png."""
    return "-".join(f"{ord(point):x}" for point in char) + ".png"


@functools.lru_cache(maxsize=4096)
def _folder_glyph(folder: Path, char: str) -> Image.Image:
    path = folder / glyph_file_name(char)
    try:
        with Image.open(path, formats=["PNG"]) as image:  # noqa: TID251
            return image.convert("RGBA")
    except OSError:
        raise UsageError(f"expected the glyph {char!r} in {folder}, there is no readable {path.name}: add it") from None


@dataclass(frozen=True)
class FolderGlyphs:
    """Glyphs kept as PNG files named by code points, see `glyph_file_name`."""

    path: Path

    def __call__(self, char: str) -> Image.Image:
        """The glyph of `char`. Raises: UsageError when the folder has none."""
        return _folder_glyph(self.path, char)

    @property
    def characters(self) -> frozenset[str]:
        """Every emoji this folder holds."""
        names = [file.stem.split("-") for file in Path(self.path).glob("*.png")]
        return frozenset("".join(chr(int(point, 16)) for point in name) for name in names)

    @property
    def digest(self) -> str:
        """SHA-256 over the names and bytes of the glyph files."""
        total = hashlib.sha256()
        for file in sorted(Path(self.path).glob("*.png")):
            total.update(file.name.encode() + b"\0" + file.read_bytes())
        return total.hexdigest()
