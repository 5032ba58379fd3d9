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
    """An image as the store takes it; and its tokens, if they are made too."""

    item: Item
    vector: np.ndarray
    thumbnail: np.ndarray
    preview: bytes | None
    tokens: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """An image that the index has already: the digest by which it knows it, and its tokens, if they are made."""

    content: str
    tokens: np.ndarray | None = None


Outcome = Row | Known | Skipped | None
"""What became of an image; None: nothing, since it is there already."""

IsKnown = Callable[[SourceImage, str], str | None]
"""(image, digest of its pixels) -> the digest by which an index has it already, None if it has not."""
MakeTokens = Callable[[Sequence[Image.Image]], np.ndarray]
"""A row of tokens for each picture."""


def embed(
    sources: Iterable[SourceImage],
    encoder: JointEncoder,
    previews: bool,
    is_known: IsKnown,
    tokenize: MakeTokens | None = None,
) -> Generator[Outcome, None, None]:
    """What becomes of each image, in their order: decoded one by one, encoded and tokenized a few at a time.

    Args:
        is_known: tells which images need not be encoded, only tokenized.
    """
    batch = _Batch(encoder, previews, tokenize)
    for source in sources:
        batch.add(source, is_known)
        if batch.is_full:
            yield from batch.finish()
            batch = _Batch(encoder, previews, tokenize)
    yield from batch.finish()


def embed_groups(
    groups: Iterable[Iterable[SourceImage]],
    encoder: JointEncoder,
    previews: bool,
    is_known: IsKnown,
    tokenize: MakeTokens | None = None,
) -> Generator[Outcome, None, None]:
    """As `embed`, group after group: an image that repeats one of another group gets tokens of its own."""
    for group in groups:
        yield from embed(group, encoder, previews, is_known, tokenize)


@dataclass(kw_only=True, slots=True)
class _Held:
    """A decoded image that is yet to be computed, and what is computed of it."""

    image: Image.Image
    item: Item
    thumbnail: np.ndarray
    preview: bytes | None
    known: str | None
    vector: np.ndarray | None = None
    tokens: np.ndarray | None = None

    def outcome(self) -> Outcome:
        if self.known is not None:
            return Known(content=self.known, tokens=self.tokens)
        assert self.vector is not None
        if not (np.isfinite(self.vector).all() and self.vector.any()):
            return Skipped(source=self.item.source, reason="the encoder gives no usable vector for it")
        return Row(
            item=self.item, vector=self.vector, thumbnail=self.thumbnail, preview=self.preview, tokens=self.tokens
        )


class _Batch:
    """Images that are computed together, in their order with those of which there is nothing to compute."""

    def __init__(self, encoder: JointEncoder, previews: bool, tokenize: MakeTokens | None) -> None:
        self.encoder, self.previews, self.tokenize = encoder, previews, tokenize
        self.entries: list[_Held | Outcome] = []

    @property
    def held(self) -> list[_Held]:
        """Those that are yet to be computed."""
        return [one for one in self.entries if isinstance(one, _Held)]

    @property
    def is_full(self) -> bool:
        """Whether there is enough to compute, or nothing that the others must wait for."""
        images = [one.image for one in self.held]
        pixels = sum(one.width * one.height for one in images)
        return (
            not images
            or max(len(images) / ENCODE_IMAGES, pixels / ENCODE_PIXELS, len(self.entries) / COMMIT_IMAGES) >= 1
        )

    def add(self, source: SourceImage, is_known: IsKnown) -> None:
        """Decode one image."""
        try:
            image = source.load()
            item = Item(source=source.source, key=source.key, content=content_digest(image))
            thumbnail = pictures.averages(image, 8).reshape(THUMBNAIL_VALUES)
            preview = preview_of(image) if self.previews else None
        except Exception as error:  # whatever a decoder raises, the job goes on
            self.entries.append(Skipped(source=source.source, reason=str(error) or type(error).__name__))
            return
        known = is_known(source, item.content)
        repeated = any(one.item.content == item.content for one in self.held)
        if repeated or (known is not None and self.tokenize is None):
            self.entries.append(None)
        else:
            held = _Held(image=image, item=item, thumbnail=thumbnail, preview=preview, known=known)
            self.entries.append(held)

    def finish(self) -> Iterator[Outcome]:
        """Compute, and tell what became of each image."""
        held = self.held
        new = [one for one in held if one.known is None]
        for one, vector in zip(new, self.encoder.encode_images([one.image for one in new]) if new else (), strict=True):
            one.vector = vector
        if held and self.tokenize is not None:
            for one, row in zip(held, self.tokenize([one.image for one in held]), strict=True):
                one.tokens = row
        for entry in self.entries:
            yield entry.outcome() if isinstance(entry, _Held) else entry


class Writer:
    """What becomes of images on its way into the store, saved many at a time."""

    def __init__(self, store: Store, told: Matched | None = None) -> None:
        self._told = told or Matched(metadata={})
        self.report = AddReport(unmatched_rows=self._told.unmatched)
        self._store = store
        self._ready: dict[str, Row] = {}

    def known(self, source: SourceImage, content: str) -> str | None:
        """The digest, if the image with it is in the store, or about to be."""
        there = content in self._ready or self._store.id_of_content(content) is not None
        return content if there else None

    def take(self, outcome: Outcome) -> None:
        """Note one image, and save when enough have come together."""
        if isinstance(outcome, Skipped):
            self.report.skipped.append(outcome)
        elif not isinstance(outcome, Row) or outcome.item.content in self._ready:
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
