"""From files to rows of a store: decode, skip what cannot be used, encode a few at a time, save many at a time."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from knn_diffusion import images as pictures
from knn_diffusion.images import SourceImage
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.retrieval.segments import THUMBNAIL_VALUES
from knn_diffusion.retrieval.store import Item, Store

PREVIEW_SIZE = 64
ENCODE_IMAGES, ENCODE_PIXELS = 64, 48_000_000
"""Decoded images held at once: at most so many, and about so many pixels."""
COMMIT_IMAGES = 512
"""Images saved together."""

Images = str | Path | Image.Image | Sequence[str | Path | Image.Image | SourceImage]


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """An image that could not be added, and why."""

    source: str
    reason: str


@dataclass(kw_only=True, slots=True)
class AddReport:
    """What became of the images given to `add` or `build`."""

    added: int = 0
    already_present: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    """Ids of the images added, in their order."""


class Batch:
    """Images on their way into the store: decoded, then encoded a few at a time, then saved many at a time."""

    def __init__(self, store: Store, encoder: JointEncoder, previews: bool, report: AddReport) -> None:
        self.report = report
        self._store, self._encoder, self._with_previews = store, encoder, previews
        self._images: list[Image.Image] = []
        self._waiting: list[tuple[Item, np.ndarray, bytes | None]] = []
        self._ready: list[tuple[Item, np.ndarray, bytes | None, np.ndarray]] = []
        self._contents: set[str] = set()

    def take(self, source: SourceImage) -> None:
        """Decode one image, and encode or save when enough have come together."""
        try:
            image = source.load()
            content = content_digest(image)
            thumbnail = pictures.to_array(pictures.square(image, 8)).reshape(THUMBNAIL_VALUES)
            preview = preview_of(image) if self._with_previews else None
        except Exception as error:  # whatever a decoder raises, the job goes on
            self.report.skipped.append(Skipped(source=source.source, reason=str(error) or type(error).__name__))
            return
        if content in self._contents or self._store.id_of_content(content) is not None:
            self.report.already_present += 1
            return
        self._contents.add(content)
        self._images.append(image)
        self._waiting.append((Item(source=source.source, key=source.key, content=content), thumbnail, preview))
        if len(self._images) >= ENCODE_IMAGES or sum(one.width * one.height for one in self._images) >= ENCODE_PIXELS:
            self.encode()
        if len(self._ready) >= COMMIT_IMAGES:
            self.commit()

    def encode(self) -> None:
        """Give the decoded images their embeddings."""
        if not self._images:
            return
        vectors = self._encoder.encode_images(self._images)
        for (item, thumbnail, preview), vector in zip(self._waiting, vectors, strict=True):
            if np.isfinite(vector).all() and vector.any():
                self._ready.append((item, thumbnail, preview, vector))
            else:
                self.report.skipped.append(
                    Skipped(source=item.source, reason="the encoder gives no usable vector for it")
                )
        self._images, self._waiting = [], []

    def commit(self) -> None:
        """Save what is encoded."""
        ready, self._ready, self._contents = self._ready, [], set()
        if not ready:
            return
        items, thumbnails, previews, vectors = zip(*ready, strict=True)
        added = self._store.append(items, np.stack(vectors), np.stack(thumbnails), previews)
        self.report.added += int(added.sum())
        self.report.already_present += int((~added).sum())
        ids = (self._store.id_of_content(item.content) for item, new in zip(items, added, strict=True) if new)
        self.report.ids += [one for one in ids if one is not None]


def content_digest(image: Image.Image) -> str:
    """SHA-256 of size and RGB pixels in hexadecimal: the same picture has the same digest in every file format.

    An image's id in an index is its first 16 digits.
    """
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height};".encode() + rgb.tobytes()).hexdigest()


def preview_of(image: Image.Image) -> bytes:
    """A WebP picture of at most 64 pixels."""
    small = image.convert("RGB")
    small.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def find_sources(images: Images) -> list[SourceImage]:
    """Pictures as they are; paths as the images found there, each file once.

    Raises: UsageError when a path does not exist or nothing is found.
    """
    given = [images] if isinstance(images, str | Path | Image.Image) else list(images)
    paths = [one for one in given if isinstance(one, str | Path)]
    found = pictures.find_images(paths) if paths or not given else []
    return found + [_as_source(one, number) for number, one in enumerate(given) if not isinstance(one, str | Path)]


def _as_source(one: Image.Image | SourceImage, number: int) -> SourceImage:
    if isinstance(one, SourceImage):
        return one
    return SourceImage(f"picture {number}", str(number), lambda: pictures.open_image(one))
