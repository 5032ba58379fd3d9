"""The truth of an image index: which images there are, where they came from, and their embeddings.

    store.sqlite                       encoder, settings, segments with their digests, items, previews, metadata
    segments/00000001.embeddings.npy   float16 [rows, dim], unit vectors
    segments/00000001.thumbnails.npy   uint8 [rows, 192], 8×8 RGB pictures; missing for vectors without pictures
    cache/                             whatever can be made again from the above

A row is the place of an image in all segments laid end to end, in the order of `segments.first_row`; the items of the
database stand in the same order. Adding appends rows, removing marks them, and compacting (`compaction.py`) takes marked
ones away and numbers the others anew. After a crash each of these has happened as a whole or not at all
(`transaction.py`). What is read is verified: the small tables when they are read, blocks of rows and items at their first
use, everything by `problems`. Other tools can read the segments with `numpy.load` and the database with `sqlite3`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Float16, Int, UInt8

from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval import compaction, manifest, verify
from knn_diffusion.retrieval.condition import rows_where
from knn_diffusion.retrieval.database import (
    SCHEMA,
    close_writer,
    connect_in_memory,
    connect_to_read,
    connect_to_write,
    pieces,
    text,
    translated_errors,
)  # fmt: skip
from knn_diffusion.retrieval.identity import DATABASE, SEGMENTS, Connection
from knn_diffusion.retrieval.items import (
    EncoderIdentity,
    Facts,
    Item,
    choose,
    item_crc,
    item_line,
    preview_crc,
    preview_is_sound,
)
from knn_diffusion.retrieval.live import LiveState
from knn_diffusion.retrieval.metadata import Value, keep_metadata, read_metadata
from knn_diffusion.retrieval.segments import THUMBNAIL_VALUES, CompactedError, Snapshot, stored_rows
from knn_diffusion.retrieval.stored_array import CURE
from knn_diffusion.retrieval.transaction import sync

__all__ = ["EncoderIdentity", "Item", "Store"]

Answer = TypeVar("Answer")
SOURCES_AT_ONCE = 100_000


class Store:
    """Images, provenance and embeddings, in a folder or in memory.

    Any number of threads and processes may read; one writes at a time. A read-only store takes additions and removals
    too, but only in memory: they are gone unless `copy_to` saves them elsewhere.

    Methods that take rows take the snapshot that they are of; without one they mean the rows as they are now.
    """

    def __init__(self, database: Connection, folder: Path | None, *, read_only: bool) -> None:
        self.live = LiveState(database, folder, read_only=read_only)
        self.folder, self.read_only = folder, read_only
        self.encoder = self.live.encoder

    @classmethod
    def create(cls, folder: Path | None, encoder: EncoderIdentity) -> Store:
        """A new, empty store in `folder`, or in memory when that is None.

        Raises: UsageError when the folder exists and is not empty; StoreError when it cannot be written.
        """
        if folder is not None:
            _make_new_folder(folder)
        database = connect_in_memory() if folder is None else connect_to_write(folder, create=True)
        values = {"format_version": manifest.FORMAT_VERSION, "encoder": json.dumps(asdict(encoder)), "sealed": "no"}
        with translated_errors(folder):
            database.executescript("BEGIN;" + SCHEMA)
            for name, value in values.items():
                manifest.put(database, name, value)
            manifest.sign(database)
            database.execute("COMMIT")
        if folder is None:
            return cls(database, None, read_only=False)
        close_writer(database, folder)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path, *, read_only: bool = False) -> Store:
        """The store in `folder`. A sealed one, or one without write permission, opens read-only.

        Raises: StoreError when there is none, or it is damaged or of another format.
        """
        if not (folder / DATABASE).is_file():
            raise StoreError(f"expected an image index in {folder}, found no {DATABASE}: check the path or build one")
        database, fixed = connect_to_read(folder)
        try:
            return cls(database, folder, read_only=read_only or fixed)
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        """Leave one database file without a journal beside it; the store cannot be used afterwards."""
        self.live.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """How messages call the store."""
        return self.live.name

    # Reading

    def __len__(self) -> int:
        return int(self.snapshot().alive.sum())

    def snapshot(self) -> Snapshot:
        """The rows as they are now, with what other processes have committed."""
        return self.live.snapshot()

    def consistently(self, read: Callable[[Snapshot], Answer]) -> Answer:
        """What `read` makes of the rows as they are now; it is called again when a compaction came in between."""
        while True:
            try:
                return read(self.snapshot())
            except CompactedError:
                continue

    def require_generation(self, snapshot: Snapshot) -> None:
        """Raise CompactedError when the rows of a snapshot are those of other images by now."""
        if self.snapshot().generation != snapshot.generation:
            raise CompactedError(f"{self.name} was compacted meanwhile: take a new snapshot and ask again")

    def setting(self, name: str) -> str | None:
        """A text kept with the store, None when it was never set."""
        found = self.live.query("SELECT value FROM settings WHERE name = ?", (name,))
        return found[0][0] if found else None

    def history(self, age: int) -> str | None:
        """A digest of all that had been added and purged when the store had this age (Snapshot.age).

        What was made from the rows at that age still holds for their records. None when the store never was at that age, or
        is of an earlier version and was not written to since.
        """
        if not self.live.query("SELECT name FROM sqlite_master WHERE name = 'history'"):
            return None
        found = self.live.query("SELECT digest FROM history WHERE age = ?", (age,))
        return found[0][0] if found else None

    def rows_of(self, ids: Sequence[str], snapshot: Snapshot | None = None) -> Int[np.ndarray, "ids"]:
        """The row of each image that is not removed, -1 for ids the store does not hold.

        Raises: CompactedError when an id may be that of an image of an older snapshot that was purged meanwhile.
        """
        now, wanted = snapshot or self.snapshot(), [text(one) for one in ids]
        found = self._rows_by("id", wanted, now)
        if snapshot is not None and (missing := [one for one in wanted if one not in found]):
            found |= self._rows_by("id", missing, now, "deleted_at IS NOT NULL")
            if len(found.keys() & set(wanted)) < len(set(wanted)):
                self.require_generation(now)
        return np.array([found.get(one, -1) for one in wanted], np.int64)

    def rows_of_contents(self, contents: Sequence[bytes], snapshot: Snapshot) -> Int[np.ndarray, "contents"]:
        """The row of each image with one of these content digests that is not removed, -1 where there is none.

        Raises: CompactedError when the snapshot is too old.
        """
        found = self._rows_by("content", contents, snapshot)
        self.require_generation(snapshot)
        return np.array([found.get(one, -1) for one in contents], np.int64)

    def rows_from(self, sources: Sequence[str], snapshot: Snapshot) -> Int[np.ndarray, "rows"]:
        """The rows of images that came from one of these sources and are not removed, in their order.

        Sources have no index, so for every 100,000 of them the database goes through all items once.

        Raises: CompactedError when the snapshot is too old.
        """
        sql = "SELECT row FROM items WHERE deleted_at IS NULL AND source IN (SELECT value FROM json_each(?))"
        records = list[int]()
        for start in range(0, len(sources), SOURCES_AT_ONCE):
            wanted = [text(one) for one in sources[start : start + SOURCES_AT_ONCE]]
            records += [record for (record,) in self.live.query(sql, (json.dumps(wanted),))]
        self.require_generation(snapshot)
        rows = np.unique(snapshot.records.rows_of(np.array(records, np.int64)))
        rows = rows[(rows >= 0) & (rows < snapshot.num_rows)]
        return rows[snapshot.alive[rows]]

    def items(self, rows: Int[np.ndarray, "rows"], snapshot: Snapshot | None = None) -> list[Item]:
        """What is known of each row. Raises: StoreError when the database does not hold one, or it is damaged."""
        now = snapshot or self.snapshot()
        found = zip(self.facts(rows, now), self.metadata(rows, now), strict=True)
        return [
            Item(id=id_, source=source, key=key, content=content.hex(), metadata=metadata)
            for (id_, source, key, content, _), metadata in found
        ]

    def facts(self, rows: Int[np.ndarray, "rows"], snapshot: Snapshot | None = None) -> list[Facts]:
        """As `items`, with the time of adding, as the database holds it."""
        now = snapshot or self.snapshot()
        records = now.records.of_rows(rows).tolist()
        found: dict[int, Facts] = {}
        columns = "row, id, source, key, content, added_at" + (", crc32" if self.live.checksums else ", NULL")
        for piece in pieces(records):
            sql = f"SELECT {columns} FROM items WHERE row IN ({','.join('?' * len(piece))})"
            for record, *facts, crc in self.live.query(sql, piece):
                found[record] = _verified(self.name, record, tuple(facts), crc)
        if missing := [record for record in records if record not in found]:
            self.require_generation(now)
            raise StoreError(f"{self.name}: row {missing[0]} is not in the database: {CURE}")
        return [found[record] for record in records]

    def metadata(self, rows: Int[np.ndarray, "rows"], snapshot: Snapshot | None = None) -> list[dict[str, Value]]:
        """The metadata of each row, empty for one without. Raises: StoreError when it is damaged."""
        if not self.live.metadata_names:
            return [{} for _ in rows]
        now = snapshot or self.snapshot()
        records = now.records.of_rows(rows).tolist()
        found = read_metadata(self.live, records)
        if len(found) < len(records):
            self.require_generation(now)
        return [found.get(record, {}) for record in records]

    def id_of_content(self, content: str) -> str | None:
        """The id of the image with this content digest, None when it is not there or removed."""
        sql = "SELECT id FROM items WHERE deleted_at IS NULL AND content = ?"
        found = self.live.query(sql, (bytes.fromhex(content),))
        return found[0][0] if found else None

    def embeddings(
        self, rows: Int[np.ndarray, "rows"], snapshot: Snapshot | None = None
    ) -> Float16[np.ndarray, "rows dim"]:
        """The stored vectors of these rows, copied. Raises: StoreError when a segment is missing or damaged."""
        if not len(rows):
            return np.empty((0, self.encoder.dim), np.float16)
        return (snapshot or self.snapshot()).embeddings(rows)

    def thumbnails(
        self, rows: Int[np.ndarray, "rows"], snapshot: Snapshot | None = None
    ) -> tuple[UInt8[np.ndarray, "rows values"], Bool[np.ndarray, "rows"]]:
        """The 8×8 pictures of these rows, and which rows have one (the others are zeros)."""
        out, known = np.zeros((len(rows), THUMBNAIL_VALUES), np.uint8), np.zeros(len(rows), bool)
        for places, local, segment in (snapshot or self.snapshot()).split(rows):
            if segment.thumbnails is not None:
                out[places], known[places] = segment.thumbnails.take(local), True
        return out, known

    def preview(self, row: int, snapshot: Snapshot | None = None) -> bytes | None:
        """The small encoded picture of a row, None when it was added without. Raises: StoreError for a damaged one."""
        record = int((snapshot or self.snapshot()).records.of_rows(np.array([row]))[0])
        for picture, crc in self.live.query("SELECT picture, crc32 FROM previews WHERE row = ?", (record,)):
            if not preview_is_sound(record, picture, crc):
                raise StoreError(f"{self.name}: the preview of row {record} is damaged: {CURE}")
            return bytes(picture)
        return None

    def matching(self, where: str, snapshot: Snapshot | None = None) -> Bool[np.ndarray, "rows"]:
        """Which rows are not removed and fulfil an SQL condition.

        Args:
            where: over id, source, key, added_at (seconds since 1970) and the names of metadata, NULL where it is missing.

        Raises: UsageError when it is no condition, names anything else, or takes too long; CompactedError when the snapshot is too old.
        """
        if snapshot is None:
            return self.consistently(lambda now: self.matching(where, now))
        with self.live.asking() as database:
            rows = snapshot.records.rows_of(rows_where(database, where, self.live.metadata_names))
        self.require_generation(snapshot)
        mask = np.zeros(snapshot.num_rows, bool)
        mask[rows[(rows >= 0) & (rows < snapshot.num_rows)]] = True
        return mask & snapshot.alive

    # Writing

    def append(
        self,
        items: Sequence[Item],
        embeddings: Float[np.ndarray, "items width"],
        thumbnails: UInt8[np.ndarray, "items values"] | None = None,
        previews: Sequence[bytes | None] | None = None,
        added_at: Sequence[float] | None = None,
    ) -> Bool[np.ndarray, "items"]:
        """Add images as one segment: all of them or, after an error, none.

        Args:
            embeddings: vectors of any length but zero; what is stored is their direction in float16.
            previews: an encoded picture to show each image by.
            added_at: seconds since 1970 of each image; None for now.

        Returns: which were added; the others were there already, with the same content.
        Raises: FingerprintError for another width; UsageError for vectors that are zero or not finite, for an id taken
            by other content and for what cannot be metadata; KnnDiffusionError when the disk is full; StoreError when another process writes.
        """
        vectors = stored_rows(embeddings, self.encoder.dim, f"{self.name}, embeddings")
        with self.live.transaction() as change:
            added, named = choose(change.database, items)
            chosen, now, before = np.flatnonzero(added), time.time(), self.snapshot()
            if not len(chosen):
                return added
            times = [now if added_at is None else added_at[place] for place in chosen.tolist()]
            facts = [item.facts(moment) for item, moment in zip(named, times, strict=True)]
            pictures = None if thumbnails is None else np.ascontiguousarray(thumbnails[chosen])
            record = before.num_records
            keep_metadata(change.database, [item.metadata for item in named], record)
            change.append(facts, vectors[chosen], pictures, before.num_rows, record)
            shown = [previews[place] for place in chosen.tolist()] if previews is not None else []
            numbered = [(number, picture) for number, picture in enumerate(shown, record) if picture]
            rows = [(number, picture, preview_crc(number, picture)) for number, picture in numbered]
            change.database.executemany("INSERT INTO previews VALUES (?, ?, ?)", rows)
            manifest.count_previews(change.database, len(rows))
        return added

    def remove(self, ids: Sequence[str], in_favor_of: Sequence[str] = ()) -> None:
        """Remove images; the next search does not see them. Their rows stay on the disk until a compaction.

        Args:
            in_favor_of: images that must be there too, such as those that the others are copies of.

        Raises: UsageError naming the first unknown id, before anything is removed.
        """
        with self.live.transaction() as change:
            now, named = self.snapshot(), [*ids, *in_favor_of]
            rows = self.rows_of(named, now)
            if unknown := [one for one, row in zip(named, rows, strict=True) if row < 0]:
                raise UsageError(
                    f"expected ids of images in {self.name}, got {unknown[0]!r} ({len(unknown)} of {len(rows)} unknown): "
                    "search the index to see its ids; nothing was removed"
                )
            records = now.records.of_rows(np.unique(rows[: len(ids)]))
            numbers = [(int(record),) for record in records]
            sql = f"UPDATE items SET deleted_at = {time.time()!r} WHERE row = ?"
            change.database.executemany(sql, numbers)
            deleted = change.database.executemany("DELETE FROM previews WHERE row = ?", numbers)
            manifest.count_previews(change.database, -max(deleted.rowcount, 0))
            manifest.add_removed(change.database, records)

    def waste(self) -> compaction.Waste:
        """What share of the rows is removed, and what a compaction would free."""
        return compaction.waste(self)

    def compact(self, progress: Progress | None = None) -> compaction.Waste:
        """Take removed images off the disk and make many small segments few; everything else stays as it is.

        Searches, additions and removals go on meanwhile; rows are numbered anew and the snapshot's generation rises.

        Returns: what there was to change.
        Raises: StoreError for a read-only or damaged store; KnnDiffusionError when the disk is full; the store is as it was.
        """
        if self.read_only:
            raise StoreError(f"{self.name} is read-only: save a copy, which leaves out what is removed")
        self.live.require_own()
        return compaction.compact(self, progress)

    def begin_history(self) -> None:
        """Give a store of an earlier version its history, as every change does."""
        with self.live.transaction():
            pass

    def set_setting(self, name: str, value: str) -> None:
        """Keep a text with the store."""
        with self.live.transaction() as change:
            manifest.put(change.database, name, value)

    def copy_to(self, folder: Path, *, sealed: bool = False) -> None:
        """Write everything that is not removed into the empty folder, in few segments.

        Args:
            sealed: the copy opens read-only and leaves no file beside its database, as a package needs it.
        """
        snapshot = self.snapshot()
        with Store.create(folder, self.encoder) as copy:
            for name, value in self.live.query("SELECT name, value FROM settings"):
                if name not in manifest.OWN_SETTINGS:
                    copy.set_setting(name, value)
            for rows in snapshot.runs():
                pictures, known = self.thumbnails(rows, snapshot)
                previews = [self.preview(int(row), snapshot) for row in rows]
                vectors, times = self.embeddings(rows, snapshot), [facts[-1] for facts in self.facts(rows, snapshot)]
                copy.append(self.items(rows, snapshot), vectors, pictures if known.all() else None, previews, times)
            copy.set_setting("sealed", "yes" if sealed else "no")

    # Verifying

    def problems(self) -> list[str]:
        """Everything that is wrong with the store, each in a few words; empty for a sound one."""
        return verify.problems(self)

    def bytes_on_disk(self) -> int:
        """Size of all files of the store, in bytes; 0 in memory."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) if self.folder else 0

    # Inside

    def _rows_by(
        self, column: str, values: Sequence[Any], snapshot: Snapshot, condition: str = "deleted_at IS NULL"
    ) -> dict[Any, int]:
        """Rows that the snapshot holds as not removed, by what stands in this column."""
        found: dict[Any, int] = {}
        for piece in pieces(list(values)):
            sql = f"SELECT {column}, row FROM items WHERE {condition} AND {column} IN ({','.join('?' * len(piece))})"
            for value, record in self.live.query(sql, piece):
                row = int(snapshot.records.rows_of(np.array([record]))[0])
                if 0 <= row < snapshot.num_rows and snapshot.alive[row]:
                    found[value] = row
        return found


def _verified(name: str, record: int, facts: Any, crc: int | None) -> Facts:
    typed = all(map(isinstance, facts, (str, str, str, bytes, float)))  # one without a checksum may be damaged too
    if not typed or (crc is not None and item_crc(record, item_line(facts)) != crc):
        raise StoreError(f"{name}: item {record} of {DATABASE} is damaged: {CURE}")
    return facts


def _make_new_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"expected a new folder for the index, {folder} exists: choose another or add to the index there"
        )
    try:
        (folder / SEGMENTS).mkdir(parents=True, exist_ok=True)
        sync(folder)
        sync(folder.parent)
    except OSError as error:
        raise StoreError(f"{folder} could not be written ({error.strerror}): choose another place") from None
