"""One image file, whatever its kind, to an upright RGB or RGBA picture; or one line saying why not."""

from __future__ import annotations

import io
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from knn_diffusion.errors import ImageError

MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 512_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FORMAT_WORDS = "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
OF_SEVERAL = "first_of_several"
"""In a picture's `info`: True if its file has more of them, frames of an animation or pages."""
NOISE = 8
"""Levels of 255 that count as nothing: so little alpha is transparent, and so near to 255 it is opaque."""


class _Quiet:
    """A block without warnings, for any number of threads at once: the first to enter switches them off, the last one on.

    Nor are truncated files filled up with grey in it, whatever another library set (`LOAD_TRUNCATED_IMAGES`).

    `warnings.catch_warnings` alone would leave them off when blocks of two threads overlap.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._caught, self._truncated = warnings.catch_warnings(), False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
                self._truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)
                ImageFile.LOAD_TRUNCATED_IMAGES = self._truncated


_QUIET = _Quiet()


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """The picture as a viewer shows it, upright by its EXIF tag: RGBA when something shows through it, else RGB.

    Of an animated or paged file it is the first picture, and `info["first_of_several"]` is True. Grey levels of 16 bits become
    8, and embedded colour profiles become sRGB. The kind of a file is decided by its content, never by its name.

    Args: source: a path, the bytes of an image file, or a picture in any of Pillow's modes.
    Raises: ImageError when it is missing, unreadable, truncated, of another format, or larger than MAX_PIXELS.
    """
    name = one_line(source) if isinstance(source, str | Path) else "the given image"
    if isinstance(source, Image.Image):
        return _guarded(source, name)
    try:
        if not isinstance(source, bytes):
            _require_regular(Path(source), name)
        opened = open_checked(_file_of(source))
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything at all on damaged files
        raise _refusal(name, error) from None
    with opened:
        picture = _guarded(opened, name)
    picture.info[OF_SEVERAL] = _has_several(source)
    return picture


def is_transparent(image: Image.Image) -> bool:
    """True if something shows through any pixel of the picture, by more than noise."""
    return image.mode == "RGBA" and any(image.getchannel("A").histogram()[: 255 - NOISE])


def one_line(name: object) -> str:
    """A file name fit for a message or a log: no line breaks or other control characters."""
    return "".join(mark if mark.isprintable() else "?" for mark in str(name))


def _has_several(source: str | Path | bytes) -> bool:
    """Asked of another opening, since a damaged second frame must not spoil the first."""
    with suppress(Exception), _QUIET, open_checked(_file_of(source)) as opened:
        return opened.format != "MPO" and bool(getattr(opened, "is_animated", False))
    return False


def _file_of(source: str | Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else Path(source)


def _require_regular(path: Path, name: str) -> None:
    if not path.is_file():
        raise ImageError(
            f"expected an image file, {name} is {'no regular file' if path.exists() else 'missing'}: check the path"
        )
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ImageError(f"expected a file of at most {MAX_FILE_BYTES // 10**6} MB, {name} is larger: make it smaller")


def open_checked(file: Path | io.BytesIO) -> Image.Image:
    """Open by the header alone; what is too large is for the caller to refuse, Pillow warns only."""
    with _QUIET:
        return Image.open(file, formats=FORMATS)  # noqa: TID251 — the one place


def _guarded(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"expected at most {MAX_PIXELS // 10**6} megapixels, {name} has {image.width} × {image.height}: make it smaller"
        )
    if not image.width or not image.height:
        raise ImageError(f"expected at least one pixel, {name} has {image.width} × {image.height}: leave it out")
    try:
        with _QUIET:
            image.load()
            return _in_colour(_in_srgb(_upright(image)))
    except Exception as error:
        raise _refusal(name, error) from None


def _refusal(name: str, error: Exception) -> ImageError:
    if isinstance(error, UnidentifiedImageError):
        return ImageError(f"expected {FORMAT_WORDS}, {name} is none of these: convert it or leave it out")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"expected at most {MAX_PIXELS // 10**6} megapixels, {name} has more: make it smaller")
    reason = one_line(error) or type(error).__name__
    return ImageError(f"expected a whole image, {name} cannot be decoded ({reason[:200]}): get an intact copy")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block does not spoil the pixels
        return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """Apply an embedded colour profile; one that is damaged or does not fit is ignored, as viewers do."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK") or b"sRGB" in profile or b"s\0R\0G\0B" in profile:
        return image
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = "RGB" if image.mode == "CMYK" else image.mode
        made = ImageCms.profileToProfile(image, embedded, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return made or image


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _levels_to_rgb(np.asarray(image) >> 8)
    if image.mode in ("I", "F"):
        return _levels_to_rgb(_scaled_levels(np.asarray(image)))
    if image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return layer if is_transparent(layer) else layer.convert("RGB")
    return image.convert("RGB")


def _levels_to_rgb(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _scaled_levels(values: np.ndarray) -> np.ndarray:
    """32-bit grey to 0…255: by the range it was evidently meant for (1, 8 bits or 16), else from least to greatest."""
    finite = np.nan_to_num(values.astype(np.float32), posinf=0, neginf=0)
    low, high = float(finite.min()), float(finite.max())
    if low < 0 or high > 65535:
        return (finite - low) * (255 / max(high - low, 1e-6))
    meant = 1 if values.dtype.kind == "f" and high <= 1 else 255 if high <= 255 else 65535
    return finite * (255 / meant)
