"""Drawn images as files of any kind, with how they were made inside."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import unescape

from PIL import ExifTags, Image, PngImagePlugin

from knn_diffusion.checkpoint import atomic_write_bytes
from knn_diffusion.config import parse_json
from knn_diffusion.errors import ImageError, UsageError
from knn_diffusion.images.decode import one_line, open_checked
from knn_diffusion.images.sticker import Finish, finished
from knn_diffusion.images.tracing import traced

FileFormat = Literal["png", "webp", "svg"]
FILE_FORMATS: tuple[FileFormat, ...] = ("png", "webp", "svg")
CHUNK = "knn_diffusion"
"""Name of the settings as JSON: a chunk of a PNG, the id of an SVG's metadata, the beginning of a WebP's description."""
PARAMETERS = (
    ("Steps", ("steps", "num_inference_steps")),
    ("Sampler", ("sampler",)),
    ("CFG scale", ("guidance_scale",)),
    ("Seed", ("seed",)),
    ("Model", ("model",)),
    ("K", ("k",)),
)
WEBP_SIDE, WEBP_BYTES = 512, 100_000
"""A WebP of at most this side is kept below this size, as messengers ask."""
WEBP_QUALITIES = (90, 80, 70, 60, 50, 40, 30, 20, 10)
MAX_SVG_BYTES = 16_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFileContent:
    """A finished image as the bytes of a file; quality: of a WebP, 90 unless it had to be smaller."""

    content: bytes
    suffix: str
    quality: int | None = None

    @property
    def reduced(self) -> bool:
        """True if quality was given up for size."""
        return self.quality is not None and self.quality < WEBP_QUALITIES[0]


def check_format(name: str) -> FileFormat:
    """The file format of that name.

    Raises: UsageError when there is none.
    """
    for known in FILE_FORMATS:
        if name == known:
            return known
    raise UsageError(f"expected format as one of {', '.join(FILE_FORMATS)}, got {name!r}: choose one of them")


def encode(
    image: Image.Image, settings: Mapping[str, Any], *, file_format: FileFormat = "png", finish: Finish | None = None
) -> ImageFileContent:
    """A drawing, finished, as a file that holds its settings.

    Args: settings: JSON-like facts; how it was finished is added to them.
    Raises: UsageError, or MissingDependencyError for SVG without vtracer.
    """
    asked = finish or Finish()
    facts = {**settings, **({} if asked.plain else {"finish": asked.facts()})}
    if file_format == "svg":
        return ImageFileContent(content=traced(image, asked, facts).encode("ascii"), suffix=".svg")
    picture = finished(image, asked)
    if file_format == "png":
        return ImageFileContent(content=png(picture, facts), suffix=".png")
    return webp(picture, facts)


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The text that Stable Diffusion web UIs and image browsers show: the prompt, then one line of settings."""
    named = [(label, next((settings[key] for key in keys if key in settings), None)) for label, keys in PARAMETERS]
    line = ", ".join(f"{label}: {value}" for label, value in named if value is not None)
    text = "\n".join(part for part in (str(settings.get("prompt", "")), line) if part)
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def png(image: Image.Image, settings: Mapping[str, Any] | None = None) -> bytes:
    """A PNG that holds its settings, as readable text (`parameters`) and as JSON (`knn_diffusion`)."""
    chunks = PngImagePlugin.PngInfo()
    if settings:
        chunks.add_text("parameters", parameters_text(settings))
        chunks.add_text(CHUNK, json.dumps(dict(settings), default=str))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write a PNG that holds its settings; a file of that name is replaced.

    Args: settings: JSON-like facts; prompt, steps, sampler, guidance_scale, seed, model and k also go into the text.
    Raises: KnnDiffusionError when the disk is full or not writable; then nothing half-written is left.
    """
    atomic_write_bytes(Path(path), png(image, settings))


def webp(image: Image.Image, settings: Mapping[str, Any] | None = None) -> ImageFileContent:
    """A WebP that holds its settings, as readable text (EXIF UserComment, as image browsers read it) and as JSON.

    Up to 512 pixels a side it is under 100 kB: quality falls from 90 in steps of 10 until it is.
    """
    limited = max(image.size) <= WEBP_SIDE
    made = ImageFileContent(content=b"", suffix=".webp")
    for quality in WEBP_QUALITIES:
        buffer = io.BytesIO()
        inside = {"exif": _exif({**settings, "quality": quality})} if settings else {}
        image.save(buffer, format="WEBP", quality=quality, alpha_quality=quality, **inside)
        made = ImageFileContent(content=buffer.getvalue(), suffix=".webp", quality=quality)
        if not limited or len(made.content) < WEBP_BYTES:
            break
    return made


def _exif(settings: Mapping[str, Any]) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = f"{CHUNK}:{json.dumps(dict(settings), default=str)}"
    comment = b"UNICODE\0" + parameters_text(settings).encode("utf-16-be")
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    return exif


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings inside a PNG, WebP or SVG this package wrote; empty for any other image.

    Raises: ImageError when the file is no readable image.
    """
    try:
        settings = parse_json(_settings_text(Path(path)))
    except Exception as error:
        raise ImageError(
            f"expected an image with settings, {one_line(path)} cannot be read ({one_line(error)}): check it"
        ) from None
    return settings if isinstance(settings, dict) else {}


def _settings_text(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(256).lstrip()
        if start.startswith((b"<svg", b"<?xml")):
            text = (start + file.read(MAX_SVG_BYTES)).decode("utf-8", "replace")
            found = re.search(rf'<metadata id="{CHUNK}">([^<]*)</metadata>', text)
            return unescape(found[1]) if found else "{}"
    with open_checked(path) as image:
        if CHUNK in image.info:
            return str(image.info[CHUNK])
        described = str(image.getexif().get(ExifTags.Base.ImageDescription, ""))
        return described.removeprefix(f"{CHUNK}:") if described.startswith(f"{CHUNK}:") else "{}"
