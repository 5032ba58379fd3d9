"""Segments: rows that were written together, as plain .npy files with their digests kept in the database.

Files are mapped when a segment is first seen and verified when they are first read. What is mapped stays readable after
the file was deleted, so a search or a training run goes on with its rows while a compaction replaces them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, Int, Int64, UInt8

from knn_diffusion.checkpoint import atomic_write_bytes, file_digest
from knn_diffusion.errors import FingerprintError, StoreError, UsageError
from knn_diffusion.retrieval.records import Records

THUMBNAIL_VALUES = 8 * 8 * 3
SEGMENT_ROWS = 65_536
HEADER_BYTES = 1024  # at most, of the .npy files that are written here
CURE = "restore a copy or build the index again"


class CompactedError(StoreError):
    """Rows of an older snapshot were asked for that a compaction has taken off the disk meanwhile: take a new snapshot."""


@dataclass(eq=False, kw_only=True, slots=True)
class Segment:
    """Rows that were written together; the arrays are verified when first asked for."""

    number: int
    first_row: int
    num_rows: int
    embeddings_sha256: str
    thumbnails_sha256: str | None
    items_sha256: str
    folder: Path | None
    """None for a segment that lives in memory."""
    embeddings: Float16[np.ndarray, "rows dim"] | None = None
    thumbnails: UInt8[np.ndarray, "rows values"] | None = None
    mapped: dict[str, np.ndarray] = field(default_factory=dict)
    """The bytes of the files by the kind of their array, not verified."""

    def path(self, kind: str) -> Path:
        """The file of one kind of array, "embeddings" or "thumbnails"."""
        assert self.folder is not None
        return self.folder / f"{self.number:08d}.{kind}.npy"

    def digests(self) -> dict[str, str]:
        """The digest of each file there must be, by its kind."""
        both = {"embeddings": self.embeddings_sha256, "thumbnails": self.thumbnails_sha256}
        return {kind: digest for kind, digest in both.items() if digest is not None}

    def hold(self) -> bool:
        """Map the files, so that they can be read whoever deletes them; False when one is not there."""
        if self.folder is None:
            return True
        for kind in self.digests().keys() - self.mapped.keys():
            with suppress(OSError, RuntimeError):  # beyond what the system maps, it is tried again when it is read
                self.mapped[kind] = _map(self.path(kind))
        return all(kind in self.mapped or self.path(kind).exists() for kind in self.digests())

    def read_embeddings(self, dim: int) -> Float16[np.ndarray, "rows dim"]:
        """The rows' unit vectors. Raises: StoreError when the file is missing or damaged."""
        if self.embeddings is None:
            self.embeddings = self._read("embeddings", self.embeddings_sha256, (self.num_rows, dim), np.float16)
        return self.embeddings

    def read_thumbnails(self) -> UInt8[np.ndarray, "rows values"] | None:
        """The rows' 8×8 pictures, None when they were added without. Raises: StoreError as above."""
        if self.thumbnails is None and self.thumbnails_sha256 is not None:
            shape = (self.num_rows, THUMBNAIL_VALUES)
            self.thumbnails = self._read("thumbnails", self.thumbnails_sha256, shape, np.uint8)
        return self.thumbnails

    def write(self) -> None:
        """Put the arrays on the disk and forget them; they are mapped when next asked for."""
        for kind, array in (("embeddings", self.embeddings), ("thumbnails", self.thumbnails)):
            if array is not None:
                atomic_write_bytes(self.path(kind), npy_bytes(array))
        self.embeddings = self.thumbnails = None

    def delete(self) -> None:
        """Take the files away, as far as that can be done."""
        for kind in self.digests() if self.folder is not None else ():
            with suppress(OSError):
                self.path(kind).unlink()

    def file_problems(self) -> Iterator[str]:
        """What is wrong with the files, each in a few words."""
        for kind, digest in self.digests().items() if self.folder is not None else ():
            if not self.path(kind).is_file():
                yield f"{self.path(kind).name} is missing"
            elif file_digest(self.path(kind)) != digest:
                yield f"{self.path(kind).name} is damaged (its digest is not the stored one)"

    def _read(self, kind: str, digest: str, shape: tuple[int, int], dtype: type) -> np.ndarray:
        path = self.path(kind)
        try:
            content = self.mapped[kind] if kind in self.mapped else _map(path)
            if hashlib.sha256(content.data).hexdigest() != digest:
                raise StoreError(f"{path} is damaged (its digest is not the stored one): {CURE}")
            array = _as_array(content)
        except (OSError, ValueError, RuntimeError) as error:
            raise StoreError(f"{path} cannot be read ({' '.join(str(error).split())}): {CURE}") from None
        if array.shape != shape or array.dtype != dtype:
            raise StoreError(f"{path}: expected {shape} {dtype.__name__}, got {array.shape} {array.dtype}: {CURE}")
        self.mapped[kind] = content
        return array


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
        parts = [segment.embeddings_sha256 for segment in self.segments[:num_segments]]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

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
            pictured[segment.first_row : segment.first_row + segment.num_rows] = segment.thumbnails_sha256 is not None
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
    usable = np.isfinite(norms) & (norms > 0)
    if not usable.all():
        bad = int(np.argmin(usable))
        found = "zero" if norms[bad] == 0 else "not finite"
        raise UsageError(
            f"{what}: expected finite vectors other than zero, row {bad} is {found}: encode that input again"
        )
    return (wide / norms[:, None]).astype(np.float32)


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


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def bytes_digest(array: np.ndarray) -> str:
    """SHA-256 of the array's .npy file."""
    return hashlib.sha256(npy_bytes(array)).hexdigest()


def _map(path: Path) -> UInt8[np.ndarray, "bytes"]:
    """The bytes of a file without reading them, and without a file kept open: an index may have very many."""
    size = path.stat().st_size
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    content.flags.writeable = False
    return content


def _as_array(content: UInt8[np.ndarray, "bytes"]) -> np.ndarray:
    """The array of a .npy file's bytes, over the same memory."""
    head = io.BytesIO(content[:HEADER_BYTES].tobytes())
    np.lib.format.read_magic(head)
    shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    return np.frombuffer(content, dtype, offset=head.tell()).reshape(shape)
