"""Compaction: removed images leave the disk, and many small segments become few.

New segments are written beside the store while others go on to search, add and remove; one short transaction then puts
them in the place of the old ones. A compaction that is cut off leaves the store as it was and a folder that the next one
deletes. An image removed meanwhile is only marked, as ever, and goes with the next compaction.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Int

from knn_diffusion.errors import KnnDiffusionError, StoreError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval import manifest
from knn_diffusion.retrieval.items import item_line
from knn_diffusion.retrieval.metadata import drop_metadata
from knn_diffusion.retrieval.segments import SEGMENT_ROWS, THUMBNAIL_VALUES, Segment, Snapshot
from knn_diffusion.retrieval.transaction import OWN_FILE, Transaction, new_segment
from knn_diffusion.retrieval.verify import item_problems

if TYPE_CHECKING:
    from knn_diffusion.retrieval.store import Store

WORKPLACE, LOCK = "compacting-", "lock"
WORTH_SHARE, WORTH_SEGMENTS = 0.1, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Waste:
    """What a compaction would change."""

    rows: int
    """Images on the disk, removed ones included."""
    removed: int
    segments: int
    segments_after: int
    bytes_freed: int
    """At least; what the removed images take in the database comes on top."""

    @property
    def share(self) -> float:
        """The part of the rows that is removed, 0 to 1."""
        return self.removed / self.rows if self.rows else 0.0

    @property
    def worthwhile(self) -> bool:
        """Whether a tenth of the rows is removed, or 64 segments could go."""
        return self.share >= WORTH_SHARE or self.segments - self.segments_after >= WORTH_SEGMENTS


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Stretch:
    """Segments that lie side by side and are replaced, and their rows that are not removed."""

    segments: tuple[Segment, ...]
    rows: Int[np.ndarray, "live"]

    @property
    def pictured(self) -> bool:
        """Whether the images have 8×8 pictures; they do or do not together."""
        return self.segments[0].thumbnails is not None

    def pieces(self) -> list[Int[np.ndarray, "some"]]:
        """The rows of each new segment."""
        return [self.rows[start : start + SEGMENT_ROWS] for start in range(0, len(self.rows), SEGMENT_ROWS)]

    def bytes_freed(self, dim: int) -> int:
        """How much smaller the files become."""
        row_bytes = 2 * dim + (THUMBNAIL_VALUES if self.pictured else 0)
        return row_bytes * (sum(segment.num_rows for segment in self.segments) - len(self.rows))


def stretches(snapshot: Snapshot) -> list[Stretch]:
    """What is worth writing again: all segments with removed rows, and small ones beside each other or beside such."""
    found, group = list[Stretch](), list[Segment]()
    for segment in snapshot.segments:
        good = segment.num_rows >= SEGMENT_ROWS // 2 and not _removed(segment, snapshot)
        alike = bool(group) and (segment.thumbnails is None) == (group[0].thumbnails is None)
        if group and (good or not alike):
            found.append(_stretch(tuple(group), snapshot))
            group = []
        group += [] if good else [segment]
    found += [_stretch(tuple(group), snapshot)] if group else []
    return [one for one in found if len(one.segments) > 1 or _removed(one.segments[0], snapshot)]


def waste(store: Store) -> Waste:
    """What a compaction of the store would change."""
    snapshot = store.snapshot()
    found = stretches(snapshot)
    fewer = sum(len(one.segments) - len(one.pieces()) for one in found)
    return Waste(
        rows=snapshot.num_rows,
        removed=int(snapshot.num_rows - snapshot.alive.sum()),
        segments=len(snapshot.segments),
        segments_after=len(snapshot.segments) - fewer,
        bytes_freed=sum(one.bytes_freed(store.encoder.dim) for one in found) + store.live.free_bytes(),
    )


def compact(store: Store, progress: Progress | None = None) -> Waste:
    """See Store.compact."""
    before, snapshot = waste(store), store.snapshot()
    if found := stretches(snapshot):
        with _workplace(store) as folder:
            made = [_rewritten(store, snapshot, one, folder) for one in _told(found, progress)]
            with store.live.transaction() as change:
                _publish(change, snapshot, found, made)
    store.live.give_back()
    return before


def _removed(segment: Segment, snapshot: Snapshot) -> int:
    return int(segment.num_rows - snapshot.alive[segment.first_row : segment.first_row + segment.num_rows].sum())


def _stretch(segments: tuple[Segment, ...], snapshot: Snapshot) -> Stretch:
    first, end = segments[0].first_row, segments[-1].first_row + segments[-1].num_rows
    return Stretch(segments=segments, rows=first + np.flatnonzero(snapshot.alive[first:end]))


def _rewritten(store: Store, snapshot: Snapshot, stretch: Stretch, folder: Path | None) -> list[Segment]:
    """The new segments of a stretch, one in memory at a time; those replaced are verified as they are read."""
    for segment in stretch.segments:
        for problem in item_problems(store, snapshot, segment):
            raise StoreError(f"{store.name}: {problem}: restore a copy or build the index again; nothing was changed")
    made = []
    for rows in stretch.pieces():
        pictures = store.thumbnails(rows, snapshot)[0] if stretch.pictured else None
        lines = list(map(item_line, store.facts(rows, snapshot)))
        segment = new_segment(lines, store.embeddings(rows, snapshot), pictures)
        segment.number = int(rows[0])  # of no other file in this folder
        if folder is not None:
            segment.write(folder)
        made.append(segment)
    return made


def _publish(change: Transaction, snapshot: Snapshot, found: list[Stretch], made: list[list[Segment]]) -> None:
    """Put the new segments in the place of the old ones, and say what has gone."""
    database = change.database
    if int(manifest.get(database, "generation") or 0) != snapshot.generation:
        raise StoreError("another compaction was faster: nothing was changed, and nothing is left to do")
    last = database.execute("SELECT max(number) FROM segments").fetchone()[0]
    replaced = {one.segments[0].number: new for one, new in zip(found, made, strict=True)}
    gone = {segment.number for one in found for segment in one.segments}
    for segment in (segment for new in made for segment in new):
        change.adopt(segment)
    rows = database.execute("SELECT number, num_rows FROM segments ORDER BY first_row").fetchall()
    for table in ("segments", "blocks"):
        database.executemany(f"DELETE FROM {table} WHERE number = ?", [(number,) for number in gone])
    first_row = 0
    for number, num_rows in rows:
        for segment in replaced.get(number, ()):
            segment.first_row = first_row
            change.name(segment)
            first_row += segment.num_rows
        if number not in gone:
            database.execute("UPDATE segments SET first_row = ? WHERE number = ?", (first_row, number))
            first_row += num_rows
    manifest.put(database, "last_segment", last)
    _purge(change, snapshot, found)


def _purge(change: Transaction, snapshot: Snapshot, found: list[Stretch]) -> None:
    covered = np.zeros(snapshot.num_rows, bool)
    for one in found:
        covered[one.segments[0].first_row : one.segments[-1].first_row + one.segments[-1].num_rows] = True
    records = snapshot.records.of_rows(np.flatnonzero(covered & ~snapshot.alive))
    change.dropped = True
    change.database.executemany("DELETE FROM items WHERE row = ?", [(int(record),) for record in records])
    drop_metadata(change.database, records)
    manifest.add_removed(change.database, records, sign=-1)
    manifest.purge(change.database, snapshot.records.without(records), snapshot.generation + 1)


def _told(found: list[Stretch], progress: Progress | None) -> Iterator[Stretch]:
    for number, one in enumerate(found):
        yield one
        if progress is not None:
            progress("compacting", number + 1, len(found))


@contextmanager
def _workplace(store: Store) -> Iterator[Path | None]:
    """A folder for the new files, after those of compactions that were cut off have been deleted.

    Each is locked while it is in use, so that no other compaction takes it for one that was cut off.
    """
    if store.folder is None:
        yield None
        return
    store.live.require_own()
    for path in store.folder.glob(WORKPLACE + "*"):
        _sweep(path)
    try:
        place = Path(tempfile.mkdtemp(prefix=WORKPLACE, dir=store.folder))
        lock = FileLock(place / LOCK)
        lock.acquire()
    except OSError as error:
        raise KnnDiffusionError(
            f"{store.folder} could not be written ({error.strerror}): free space or change permissions; nothing was changed"
        ) from None
    try:
        yield place
    finally:
        lock.release()
        shutil.rmtree(place, ignore_errors=True)


def _sweep(workplace: Path) -> None:
    """Delete what a compaction that was cut off left, and nothing else."""
    if workplace.is_symlink():
        return
    with suppress(OSError, Timeout), FileLock(workplace / LOCK, blocking=False):
        for file in workplace.iterdir():
            if file.name == LOCK or OWN_FILE.fullmatch(file.name):
                file.unlink()
        workplace.rmdir()
