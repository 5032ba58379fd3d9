"""Images whose embeddings were imported without pixels, found again by name when the pixels turn up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
from jaxtyping import Int64, UInt64

from knn_diffusion.errors import ImageError
from knn_diffusion.images import SourceImage
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

RECORDS_AT_ONCE = 1_000_000
SAMPLED = 4
"""Images of a unit that are embedded to see whether names tell the truth."""
SAME_IMAGE = 0.95
"""Least cosine of an imported embedding and our own of the same image; other hardware and resizing stay above 0.99."""


class ImportedNames:
    """The sources and keys of images that an index knows by their vectors alone.

    A file of img2dataset's shards, `00012.tar::000120034.jpg`, has the key 000120034 in clip-retrieval's tables. A name that
    several images have tells nothing. Sixteen bytes are held for each name.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._names, self._records = store.consistently(self._read)

    def contents_of(self, images: Sequence[SourceImage], encoder: JointEncoder) -> dict[str, str]:
        """Source -> the digest by which the index knows the image, for those it has exactly one of by source or key.

        None are told when a sample of them looks otherwise to the encoder: then they are images of the same names.
        """
        records = {image.source: self._record_of(image) for image in images} if len(self._names) else {}
        found = [image for image in images if records.get(image.source, -1) >= 0]
        if not found or not self._agree(found[:: -(-len(found) // SAMPLED)], records, encoder):
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

    def _agree(self, images: Sequence[SourceImage], records: dict[str, int], encoder: JointEncoder) -> bool:
        pictures, wanted = [], []
        for image in images:
            try:
                pictures.append(image.load())
            except ImageError:
                continue
            wanted.append(records[image.source])

        def read(now: Snapshot) -> np.ndarray:
            rows = now.records.rows_of(np.array(wanted, np.int64))
            return self._store.embeddings(rows[rows >= 0], now) if (rows >= 0).all() else np.zeros((0, 0))

        stored = self._store.consistently(read).astype(np.float32)
        if not pictures or len(stored) != len(pictures):
            return False
        return bool(((encoder.encode_images(pictures) * stored).sum(1) >= SAME_IMAGE).all())

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


def _key(name: str) -> np.uint64:
    """Eight bytes for a name."""
    digest = hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest))
