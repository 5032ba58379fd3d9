"""Images whose embeddings were imported without pixels, found again by name when the pixels turn up."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import PurePath

import numpy as np
from jaxtyping import Int64, UInt64
from PIL import Image

from knn_diffusion.errors import ImageError
from knn_diffusion.images import SourceImage
from knn_diffusion.images.decode import one_line
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

RECORDS_AT_ONCE = 1_000_000
SAMPLED = 8
"""Images of a shard that are embedded to see whether names tell the truth: the first, the last, and some between by chance."""
SAME_IMAGE = 0.95
"""Least cosine of an imported embedding and our own of the same image; other hardware and resizing stay above 0.99."""


class ImportedNames:
    """The sources and keys of images that an index knows by their vectors alone.

    A file of img2dataset's shards, `00012.tar::000120034.jpg`, has the key 000120034 in clip-retrieval's tables. A name that
    several images have tells nothing. Sixteen bytes are held for each name.
    """

    def __init__(self, store: Store, encoder: JointEncoder, notice: Callable[[str], None] | None = None) -> None:
        """Args: notice: told in a line of images whose names are those of others."""
        self._store, self._encoder, self._notice = store, encoder, notice
        self._names, self._records = store.consistently(self._read)

    def contents_of(self, images: Sequence[SourceImage]) -> dict[str, str]:
        """Source -> the digest by which the index knows the image, for those it has exactly one of by source or key.

        None are told when one of a sample looks otherwise to the encoder: then names are not to be believed.
        """
        records = {image.source: self._record_of(image) for image in images} if len(self._names) else {}
        found = [image for image in images if records.get(image.source, -1) >= 0]
        if not found or not self._agree(_sample(found), records):
            return {}
        contents = self._contents([records[image.source] for image in found])
        return {image.source: content for image, content in zip(found, contents, strict=True) if content}

    def _record_of(self, image: SourceImage) -> int:
        """The only one of that name, or -1."""
        for name in (image.source, image.key, PurePath(image.key).stem):
            start, end = (int(np.searchsorted(self._names, _key(name), side)) for side in ("left", "right"))
            if end > start and (self._records[start:end] == self._records[start]).all():
                return int(self._records[start])
        return -1

    def _agree(self, images: Sequence[SourceImage], records: dict[str, int]) -> bool:
        loaded = list[tuple[SourceImage, Image.Image]]()
        for image in images:
            with suppress(ImageError):
                loaded.append((image, image.load()))
        wanted = np.array([records[image.source] for image, _ in loaded], np.int64)

        def read(now: Snapshot) -> np.ndarray:
            rows = now.records.rows_of(wanted)
            return self._store.embeddings(rows, now) if (rows >= 0).all() else np.zeros((0, 0))

        stored = self._store.consistently(read).astype(np.float32)
        if not loaded or len(stored) != len(loaded):
            return False
        cosines = (self._encoder.encode_images([picture for _, picture in loaded]) * stored).sum(1)
        if (cosines >= SAME_IMAGE).all():
            return True
        if self._notice is not None:
            worst = int(cosines.argmin())
            self._notice(
                f"{one_line(loaded[worst][0].source)} is not the image that the index has by its name (cosine {cosines[worst]:.2f}): "
                f"images of {one_line(loaded[worst][0].file)} are embedded instead"
            )
        return False

    def _contents(self, records: Sequence[int]) -> list[str | None]:
        """The digest of each record, None of those removed meanwhile."""

        def read(now: Snapshot) -> list[str | None]:
            rows = now.records.rows_of(np.array(records, np.int64))
            alive = (rows >= 0) & now.alive[rows.clip(0)]
            facts = iter(self._store.facts(rows[alive], now))
            return [next(facts)[3].hex() if one else None for one in alive.tolist()]

        return self._store.consistently(read)

    def _read(self, now: Snapshot) -> tuple[UInt64[np.ndarray, "names"], Int64[np.ndarray, "names"]]:
        names, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for segment in now.segments:
            if segment.thumbnails is not None:
                continue
            rows = np.arange(segment.first_row, segment.first_row + segment.num_rows)
            records = now.records.of_rows(rows[now.alive[rows]])
            for start in range(0, len(records), RECORDS_AT_ONCE):
                some = records[start : start + RECORDS_AT_ONCE]
                sql = "SELECT row, source, key FROM items WHERE deleted_at IS NULL AND row BETWEEN ? AND ?"
                found = self._store.live.query(sql, (int(some[0]), int(some[-1])))
                for column in (1, 2):
                    named = [(_key(row[column]), row[0]) for row in found if row[column]]
                    names.append(np.array([key for key, _ in named], np.uint64))
                    owners.append(np.array([record for _, record in named], np.int64))
        self._store.require_generation(now)
        every, records = np.concatenate(names), np.concatenate(owners)
        order = np.argsort(every, kind="stable")
        return every[order], records[order]


def _sample(images: Sequence[SourceImage]) -> list[SourceImage]:
    """The same ones of the same images."""
    between = random.Random(images[0].source).sample(range(len(images)), min(SAMPLED, len(images)))
    return [images[place] for place in sorted({0, len(images) - 1, *between[: SAMPLED - 2]})]


def _key(name: str) -> np.uint64:
    """Eight bytes for a name."""
    digest = hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest))
