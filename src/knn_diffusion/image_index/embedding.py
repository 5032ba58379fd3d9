"""Images to embeddings and tokens: decoded by threads, computed a few at a time, told of in their order."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image

from knn_diffusion import images as pictures
from knn_diffusion.image_index.hints import Hint, hints_of
from knn_diffusion.image_index.settings import NEW_SIDE
from knn_diffusion.images import SourceImage
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.retrieval.segments import THUMBNAIL_VALUES
from knn_diffusion.retrieval.store import Item

PREVIEW_QUALITY = 80
ENCODE_IMAGES, ENCODE_PIXELS, ENTRIES = 64, 48_000_000, 512
"""Decoded images held at once: at most so many, and about so many pixels; and outcomes that wait for them."""
DECODERS = 4
"""Threads that decode, if torch computes in as many. More would hold more large pictures than they save time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """An image that could not be added, and why."""

    source: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An image as the store takes it; and its tokens, if they are made too."""

    item: Item
    vector: np.ndarray
    thumbnail: np.ndarray
    preview: bytes | None
    hints: tuple[Hint, ...] = ()
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
    side: int | None,
    is_known: IsKnown,
    tokenize: MakeTokens | None = None,
) -> Generator[Outcome, None, None]:
    """What becomes of each image, in their order.

    Args:
        side: pixels across a preview, None for no previews.
        is_known: tells which images need not be encoded, only tokenized.
    """
    batch = _Batch(encoder, tokenize)
    for read in _read_ahead(sources, side):
        batch.add(read, is_known)
        if batch.is_full:
            yield from batch.finish()
            batch = _Batch(encoder, tokenize)
    yield from batch.finish()


@dataclass(frozen=True, slots=True)
class Group:
    """Images that are embedded together; and tokenized, if tokens are made at all and theirs are not there."""

    images: Sequence[SourceImage]
    tokenized: bool = True


def embed_groups(
    groups: Iterable[Group],
    encoder: JointEncoder,
    side: int | None,
    is_known: IsKnown,
    tokenize: MakeTokens | None = None,
) -> Generator[Outcome, None, None]:
    """As `embed`, group after group: an image that repeats one of another group gets tokens of its own."""
    for group in groups:
        yield from embed(group.images, encoder, side, is_known, tokenize if group.tokenized else None)


@dataclass(kw_only=True, slots=True)
class _Held:
    """A decoded image that is yet to be computed, and what is computed of it."""

    source: SourceImage
    image: Image.Image
    item: Item
    thumbnail: np.ndarray
    preview: bytes | None
    hints: tuple[Hint, ...]
    known: str | None = None
    vector: np.ndarray | None = None
    tokens: np.ndarray | None = None

    def outcome(self) -> Outcome:
        if self.known is not None:
            return Known(content=self.known, tokens=self.tokens)
        assert self.vector is not None
        if not (np.isfinite(self.vector).all() and self.vector.any()):
            return Skipped(source=self.item.source, reason="the encoder gives no usable vector for it")
        return Row(
            item=self.item,
            vector=self.vector,
            thumbnail=self.thumbnail,
            preview=self.preview,
            hints=self.hints,
            tokens=self.tokens,
        )


def _read_ahead(sources: Iterable[SourceImage], side: int | None) -> Iterator[_Held | Skipped]:
    """The images in their order, decoded while those before are computed."""
    coming, threads = iter(sources), max(1, min(DECODERS, torch.get_num_threads()))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        begun: deque[Future[_Held | Skipped]] = deque()
        begun.extend(pool.submit(_read, one, side) for one in islice(coming, 2 * threads))
        while begun:
            read = begun.popleft().result()
            begun.extend(pool.submit(_read, one, side) for one in islice(coming, 1))
            yield read
    finally:
        pool.shutdown(cancel_futures=True)


def _read(source: SourceImage, side: int | None) -> _Held | Skipped:
    try:
        image = source.load()
        item = Item(source=source.source, key=source.key, content=content_digest(image))
        framed = pictures.frame(image, side or NEW_SIDE)
        thumbnail = pictures.averages(image, 8).reshape(THUMBNAIL_VALUES)
        preview = encoded_preview(framed) if side else None
        hints = hints_of(image, framed)
    except Exception as error:  # whatever a decoder raises, the job goes on
        return Skipped(source=source.source, reason=str(error) or type(error).__name__)
    return _Held(source=source, image=image, item=item, thumbnail=thumbnail, preview=preview, hints=hints)


class _Batch:
    """Images that are computed together, in their order with those of which there is nothing to compute."""

    def __init__(self, encoder: JointEncoder, tokenize: MakeTokens | None) -> None:
        self.encoder, self.tokenize = encoder, tokenize
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
        full = len(images) >= ENCODE_IMAGES or pixels >= ENCODE_PIXELS or len(self.entries) >= ENTRIES
        return full or not images

    def add(self, read: _Held | Skipped, is_known: IsKnown) -> None:
        """Take one more image."""
        if isinstance(read, Skipped):
            self.entries.append(read)
            return
        read.known = is_known(read.source, read.item.content)
        repeated = any(one.item.content == read.item.content for one in self.held)
        nothing_to_do = repeated or (read.known is not None and self.tokenize is None)
        self.entries.append(None if nothing_to_do else read)

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


def content_digest(image: Image.Image) -> str:
    """SHA-256 of size and pixels in hexadecimal: the same picture has the same digest in every file format.

    Alpha counts where something shows through the picture; colours that nobody sees do not. An image's id in an index is the
    first 16 digits.
    """
    if pictures.is_transparent(image):
        seen = Image.composite(image, Image.new("RGBA", image.size), image.getchannel("A").point([0, *[255] * 255]))
        return hashlib.sha256(f"{image.width}x{image.height} RGBA;".encode() + seen.tobytes()).hexdigest()
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height};".encode() + rgb.tobytes()).hexdigest()


def encoded_preview(framed: Image.Image) -> bytes:
    """A framed picture as WebP, with its alpha if something shows through it."""
    buffer = io.BytesIO()
    framed.save(buffer, "WEBP", quality=PREVIEW_QUALITY)
    return buffer.getvalue()
