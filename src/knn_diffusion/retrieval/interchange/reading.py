"""Vectors of other tools into a store: in batches of one segment, again from where an interrupted import stopped.

A vector without its image has no pixels to know it by, so the SHA-256 of its direction in float16 stands for the content:
what is the same to every search is there once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from jaxtyping import Float, Float16

from knn_diffusion.config import parse_json
from knn_diffusion.errors import FingerprintError, StoreError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.interchange.tables import Provenance
from knn_diffusion.retrieval.interchange.vector_files import VectorFiles
from knn_diffusion.retrieval.segments import SEGMENT_ROWS, stored_rows
from knn_diffusion.retrieval.store import Item, Store

BATCH_ROWS, BATCH_VALUES = SEGMENT_ROWS, 2**25
"""Vectors taken together: one segment, and fewer where they are wider than 512, to bound memory."""
SKIPPED_LISTED = 1000
POSITION = "import"
"""The setting that says how far an unfinished import has come."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedRow:
    """A vector that was not imported, and why."""

    source: str
    reason: str


@dataclass(kw_only=True, slots=True)
class ImportReport:
    """What became of the vectors.

    rows             vectors in the files
    resumed_at       how many an earlier, interrupted import had dealt with
    added            new in the index
    already_present  the same vector was there, or came earlier in the files
    num_skipped      cannot be used; `skipped` lists the first 1,000
    reasons          how many were skipped for each reason
    """

    rows: int
    resumed_at: int = 0
    added: int = 0
    already_present: int = 0
    num_skipped: int = 0
    skipped: list[SkippedRow] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def skip(self, source: str, reason: str, detail: str = "") -> None:
        """Count a vector that cannot be used, and list it while the list is short."""
        self.num_skipped += 1
        self.reasons[reason] += 1
        if len(self.skipped) < SKIPPED_LISTED:
            self.skipped.append(SkippedRow(source=source, reason=reason + detail))


def import_vectors(store: Store, files: VectorFiles, *, progress: Progress | None = None) -> ImportReport:
    """Add the vectors of the files to the store; each batch is on the disk when the next one starts.

    Vectors that are zero or not finite, or whose id belongs to another vector, are listed and passed over; so are those
    that are there already. After an interruption the same call goes on where it stopped; files that were changed meanwhile
    are gone through from their beginning, which doubles nothing.

    Raises: FingerprintError when the vectors have another width; StoreError when a file is damaged; KnnDiffusionError when
        the disk is full: earlier batches stay.
    """
    if files.dim != store.encoder.dim:
        raise FingerprintError(
            f"expected vectors of {store.encoder.dim} numbers, as {store.encoder.name} makes them, got {files.dim} in "
            f"{files.shards[0].path}: name the encoder that made them"
        )
    digest = files.digest()
    start = _position(store, digest, files.num_rows)
    report = ImportReport(rows=files.num_rows, resumed_at=start)
    for stop, vectors, told in _batches(files, start):
        _add(store, vectors, told, report)
        store.set_setting(POSITION, json.dumps({"files": digest, "rows": stop}) if stop < files.num_rows else "")
        if progress is not None:
            progress("importing embeddings", stop, files.num_rows)
    return report


def _position(store: Store, digest: str, num_rows: int) -> int:
    """How many rows an interrupted import of the same files has dealt with."""
    found = parse_json(store.setting(POSITION) or "{}")
    return min(int(found["rows"]), num_rows) if found.get("files") == digest else 0


def _batches(files: VectorFiles, start: int) -> Iterator[tuple[int, Float[np.ndarray, "rows dim"], list[Provenance]]]:
    """Where each batch ends, its vectors, and what is known of them."""
    told, most = files.rows(start), max(1, min(BATCH_ROWS, BATCH_VALUES // files.dim))
    while start < files.num_rows:
        stop = min(start + most, files.num_rows)
        some = list(islice(told, stop - start))
        if len(some) < stop - start:
            raise StoreError(f"a table beside {files.shards[0].path} ended at row {start + len(some)}: copy it again")
        yield stop, files.vectors(start, stop), some
        start = stop


def _add(
    store: Store, vectors: Float[np.ndarray, "rows dim"], told: Sequence[Provenance], report: ImportReport
) -> None:
    wide: np.ndarray = vectors.astype(np.float32 if vectors.dtype == np.float16 else np.float64)
    norms = np.einsum("rd,rd->r", wide, wide)
    usable = np.isfinite(norms) & (norms > 0)
    for place in np.flatnonzero(~usable).tolist():
        report.skip(told[place].source or "", "zero vector" if norms[place] == 0 else "not finite")
    kept = np.flatnonzero(usable).tolist()
    if not kept:
        return
    rows = stored_rows(vectors if len(kept) == len(vectors) else vectors[kept], store.encoder.dim, "embeddings")
    items = [_item(told[place], row) for place, row in zip(kept, rows, strict=True)]
    free = np.ones(len(items), bool)
    for place in _taken(store, items):
        free[place] = False
        item = items[place]
        report.skip(item.source, "its id belongs to another vector", f": {item.id}")
    if free.any():
        added = store.append([items[place] for place in np.flatnonzero(free)], rows[free])
        report.added += int(added.sum())
        report.already_present += int((~added).sum())


def _item(told: Provenance, row: Float16[np.ndarray, "dim"]) -> Item:
    content = told.content or vector_digest(row)
    return Item(id=told.id, source=told.source or "", key=told.key, content=content, metadata=told.metadata)


def vector_digest(row: Float16[np.ndarray, "dim"]) -> str:
    """SHA-256 of width and float16 numbers, in hexadecimal: stands for the content of an image that is not at hand."""
    return hashlib.sha256(f"vector {len(row)};".encode() + row.tobytes()).hexdigest()


def _taken(store: Store, items: Sequence[Item]) -> list[int]:
    """Places of the items whose id belongs to other content, in the store or earlier in the list."""
    ids = sorted({item.id for item in items if item.id})
    rows = store.rows_of(ids)
    owners = {id_: content.hex() for id_, _, _, content, _ in store.facts(rows[rows >= 0])}
    return [
        place
        for place, item in enumerate(items)
        if item.id and owners.setdefault(item.id, item.content) != item.content
    ]
