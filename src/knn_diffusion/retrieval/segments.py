"""Segments: rows that were written together, as plain .npy files with their digests kept in the database.

Files are mapped when a segment is first seen and verified when they are first read (`stored_array.py`). What is mapped
stays readable after the file was deleted, so a search or a training run goes on with its rows while a compaction replaces
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float16, Float32, Int, Int64

from knn_diffusion.errors import FingerprintError, StoreError, UsageError
from knn_diffusion.retrieval.records import Records
from knn_diffusion.retrieval.stored_array import StoredArray

THUMBNAIL_VALUES = 8 * 8 * 3
SEGMENT_ROWS = 65_536
ROW_BY_ROW = 3
"""Vectors are read one by one while there are fewer for each segment than this: finding out which lie together takes as long."""


class CompactedError(StoreError):
    """Rows of an older snapshot were asked for that a compaction has taken off the disk meanwhile: take a new snapshot."""


@dataclass(eq=False, kw_only=True, slots=True)
class Segment:
    """Rows that were written together."""

    number: int
    first_row: int
    num_rows: int
    embeddings: StoredArray
    """float16 [rows, dim], unit vectors."""
    thumbnails: StoredArray | None
    """uint8 [rows, 192], None for rows that were added without pictures."""
    items_sha256: str

    def arrays(self) -> dict[str, StoredArray]:
        """What there is, by the kind that stands in the name of its file."""
        both = {"embeddings": self.embeddings, "thumbnails": self.thumbnails}
        return {kind: array for kind, array in both.items() if array is not None}

    def hold(self) -> bool:
        """Map the files, so that they can be read whoever deletes them; False when one is not there."""
        return all(array.hold() for array in self.arrays().values())

    def write(self, folder: Path) -> None:
        """Put the arrays on the disk and forget them; they are mapped when next asked for."""
        for kind, array in self.arrays().items():
            array.write(folder / file_name(self.number, kind))

    def delete(self) -> None:
        """Take the files away, as far as that can be done."""
        for array in self.arrays().values():
            with suppress(OSError):
                if array.path is not None:
                    array.path.unlink()


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What one search sees from beginning to end, whatever is added or removed meanwhile."""

    alive: Bool[np.ndarray, "rows"]
    segments: tuple[Segment, ...]
    generation: int = 0
    """Raised by every compaction: rows of another generation may be other images."""
    records: Records = field(default_factory=Records.complete)
    """Which number in the database each row has."""
    firsts: Int64[np.ndarray, "segments"] = field(init=False, repr=False)
    """The first row of each segment."""
    numbers: tuple[int, ...] = field(init=False, repr=False)
    """The numbers of the segments. They are never used twice, so what was made from the first ones still holds while a
    later snapshot begins with them."""

    def __post_init__(self) -> None:
        firsts = np.array([segment.first_row for segment in self.segments], np.int64)
        object.__setattr__(self, "firsts", firsts)
        object.__setattr__(self, "numbers", tuple(segment.number for segment in self.segments))

    @property
    def num_rows(self) -> int:
        """Rows on the disk, removed ones included."""
        return len(self.alive)

    @property
    def num_records(self) -> int:
        """Records given so far, purged ones included; the next image gets this one."""
        return self.num_rows + self.records.num_purged

    @property
    def age(self) -> int:
        """Grows with every append and every compaction; what the store's history is kept by."""
        return self.num_records + self.generation

    @property
    def live_rows(self) -> Int[np.ndarray, "items"]:
        """The rows that are not removed, in the order they were added."""
        return np.flatnonzero(self.alive)

    def digest(self, num_segments: int) -> str:
        """What the first segments hold, in one SHA-256; anything derived from their rows is stale when it changes.

        A compaction changes the digest of all segments, and that of the first few when it renumbers their rows.
        """
        parts = [segment.embeddings.sha256 for segment in self.segments[:num_segments]]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def embeddings(self, rows: Int[np.ndarray, "rows"]) -> Float16[np.ndarray, "rows dim"]:
        """The stored vectors of these rows, at least one, copied. Raises: StoreError when a file is missing or damaged."""
        width = self.segments[0].embeddings.shape[1]
        if len(rows) < ROW_BY_ROW * len(self.segments):
            owners = self.firsts.searchsorted(rows, side="right") - 1
            found = zip(owners.tolist(), (rows - self.firsts[owners]).tolist(), strict=True)
            arrays = [segment.embeddings for segment in self.segments]
            return np.concatenate([arrays[owner].row(row) for owner, row in found]).reshape(-1, width)
        out = np.empty((len(rows), width), np.float16)
        for places, local, segment in self.split(rows):
            out[places] = segment.embeddings.take(local)
        return out

    def split(
        self, rows: Int[np.ndarray, "rows"]
    ) -> Iterator[tuple[Int[np.ndarray, "some"], Int[np.ndarray, "some"], Segment]]:
        """Which of the rows lie in which segment: their places in `rows`, their rows inside the segment, the segment."""
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        owners = self.firsts.searchsorted(ordered, side="right") - 1
        starts = (1 + np.flatnonzero(owners[1:] != owners[:-1])).tolist()
        for start, end in pairwise([0, *starts, len(rows)] if len(rows) else ()):
            segment = self.segments[owners[start]]
            yield order[start:end], ordered[start:end] - segment.first_row, segment

    def runs(self) -> Iterator[Int[np.ndarray, "some"]]:
        """Live rows in pieces that make one segment each: of bounded length, all with pictures or all without."""
        pictured = np.zeros(self.num_rows, bool)
        for segment in self.segments:
            pictured[segment.first_row : segment.first_row + segment.num_rows] = segment.thumbnails is not None
        rows = self.live_rows
        for run in np.split(rows, np.flatnonzero(np.diff(pictured[rows])) + 1):
            yield from (run[start : start + SEGMENT_ROWS] for start in range(0, len(run), SEGMENT_ROWS))


def unit_rows(vectors: Float[np.ndarray, "rows width"], dim: int, what: str) -> Float32[np.ndarray, "rows dim"]:
    """The vectors' directions.

    Raises: FingerprintError for another width than `dim`; UsageError for a vector that is zero or not finite.
    """
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise FingerprintError(
            f"{what}: expected vectors of {dim} numbers, got {vectors.shape[-1]}: use the index's encoder"
        )
    wide = vectors.astype(np.float64)
    norms = np.sqrt(np.einsum("rw,rw->r", wide, wide))
    if len(norms) and not 0 < norms.min() <= norms.max() < np.inf:  # nor where one is not a number
        bad = int(np.argmin(np.isfinite(norms) & (norms > 0)))
        found = "zero" if norms[bad] == 0 else "not finite"
        raise UsageError(
            f"{what}: expected finite vectors other than zero, row {bad} is {found}: encode that input again"
        )
    wide /= norms[:, None]
    return wide.astype(np.float32)


def stored_rows(vectors: Float[np.ndarray, "rows width"], dim: int, what: str) -> Float16[np.ndarray, "rows dim"]:
    """The vectors' directions as a store keeps them; float16 rows that are so already stay, bit for bit.

    Raises: as `unit_rows`.
    """
    already = np.zeros(len(vectors), bool)
    if vectors.dtype == np.float16:  # rounding moved its length off 1 by at most 2⁻¹¹; dividing again would move bits
        wide = vectors.astype(np.float32)
        already = np.abs(np.einsum("...d,...d->...", wide, wide) - 1) < 2**-9
    if vectors.shape[1:] == (dim,) and len(vectors) and already.all():
        return vectors.copy()
    rows = unit_rows(vectors, dim, what).astype(np.float16)
    rows[already] = vectors[already]
    return rows


def file_name(number: int, kind: str) -> str:
    """Of one kind of array of a segment."""
    return f"{number:08d}.{kind}.npy"
