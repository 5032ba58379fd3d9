"""From files to rows of a store: decode, skip what cannot be used, encode a few at a time, save many at a time."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from knn_diffusion import images as pictures
from knn_diffusion.image_index.metadata_table import Matched
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
    unmatched_rows: int = 0
    """Rows of the tables of metadata that tell of none of the images, or of several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An image as the store takes it."""

    item: Item
    vector: np.ndarray
    thumbnail: np.ndarray
    preview: bytes | None


Outcome = Row | Skipped | None
"""What became of an image; None: it is there already."""


def embed(
    sources: Iterable[SourceImage], encoder: JointEncoder, previews: bool, is_known: Callable[[str], bool]
) -> Generator[Outcome, None, None]:
    """What becomes of each image: decoded one by one, encoded a few at a time.

    Args:
        is_known: whether an image with this content digest is there already, so that it need not be encoded.
    """
    images, waiting = list[Image.Image](), list[_Unplaced]()
    for source in sources:
        try:
            image = source.load()
            found = _unplaced(source, image, previews)
        except Exception as error:  # whatever a decoder raises, the job goes on
            yield Skipped(source=source.source, reason=str(error) or type(error).__name__)
            continue
        if is_known(found[0].content) or any(found[0].content == item.content for item, *_ in waiting):
            yield None
            continue
        images.append(image)
        waiting.append(found)
        if len(images) >= ENCODE_IMAGES or sum(one.width * one.height for one in images) >= ENCODE_PIXELS:
            yield from _placed(encoder, images, waiting)
            images, waiting = [], []
    if images:
        yield from _placed(encoder, images, waiting)


class Writer:
    """What becomes of images on its way into the store, saved many at a time."""

    def __init__(self, store: Store, told: Matched | None = None) -> None:
        self._told = told or Matched(metadata={})
        self.report = AddReport(unmatched_rows=self._told.unmatched)
        self._store = store
        self._ready: dict[str, Row] = {}

    def knows(self, content: str) -> bool:
        """Whether the image with this content digest is in the store, or about to be."""
        return content in self._ready or self._store.id_of_content(content) is not None

    def take(self, outcome: Outcome) -> None:
        """Note one image, and save when enough have come together."""
        if isinstance(outcome, Skipped):
            self.report.skipped.append(outcome)
        elif outcome is None or outcome.item.content in self._ready:
            self.report.already_present += 1
        else:
            self._ready[outcome.item.content] = outcome
        if len(self._ready) >= COMMIT_IMAGES:
            self.commit()

    def commit(self) -> None:
        """Save what has come together."""
        ready, self._ready = list(self._ready.values()), {}
        if not ready:
            return
        vectors, thumbnails = np.stack([row.vector for row in ready]), np.stack([row.thumbnail for row in ready])
        items = [replace(row.item, metadata=self._told.metadata.get(row.item.source, {})) for row in ready]
        added = self._store.append(items, vectors, thumbnails, [row.preview for row in ready])
        self.report.added += int(added.sum())
        self.report.already_present += int((~added).sum())
        ids = (self._store.id_of_content(row.item.content) for row, new in zip(ready, added, strict=True) if new)
        self.report.ids += [one for one in ids if one is not None]


_Unplaced = tuple[Item, np.ndarray, bytes | None]


def _unplaced(source: SourceImage, image: Image.Image, previews: bool) -> _Unplaced:
    item = Item(source=source.source, key=source.key, content=content_digest(image))
    thumbnail = pictures.averages(image, 8).reshape(THUMBNAIL_VALUES)
    return item, thumbnail, preview_of(image) if previews else None


def _placed(encoder: JointEncoder, images: list[Image.Image], waiting: list[_Unplaced]) -> Iterator[Row | Skipped]:
    """The images with their embeddings."""
    for (item, thumbnail, preview), vector in zip(waiting, encoder.encode_images(images), strict=True):
        if np.isfinite(vector).all() and vector.any():
            yield Row(item=item, vector=vector, thumbnail=thumbnail, preview=preview)
        else:
            yield Skipped(source=item.source, reason="the encoder gives no usable vector for it")


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
    small.save(buffer, "WEBP", quality=70)
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
