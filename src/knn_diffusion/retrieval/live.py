"""The present state of a store: its connections to the database, and the snapshot that reads start from.

Any number of threads read through one connection, in turn; another one writes. Each condition, which may take long, has its own.
In memory all connections are the same, so that a reader waits for the end of a transaction. A snapshot is made anew when
somebody, here or elsewhere, has committed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from knn_diffusion.errors import StoreError
from knn_diffusion.retrieval.database import (
    close_writer,
    connect_in_memory,
    connect_to_read,
    connect_to_write,
    free_bytes,
    give_back,
    translated_errors,
)  # fmt: skip
from knn_diffusion.retrieval.identity import SEGMENTS, Connection, moved, refuse_links, require_in_place, state_of
from knn_diffusion.retrieval.manifest import Manifest, read_manifest
from knn_diffusion.retrieval.segments import THUMBNAIL_VALUES, Segment, Snapshot, file_name
from knn_diffusion.retrieval.stored_array import CURE, StoredArray
from knn_diffusion.retrieval.transaction import Transaction, transaction

UNSEEN = -1

MANY = 10_000_000
"""Rows for which memory is not taken before a segment's file has that size; smaller damage is found where it is read."""


class LiveState:
    """What a store is now, for any number of threads."""

    def __init__(self, database: Connection, folder: Path | None, *, read_only: bool) -> None:
        self.folder, self.read_only = folder, read_only
        self.name = str(folder) if folder is not None else "the index in memory"
        self.checksums = False
        """Whether items have checksums of their own."""
        self.metadata_names: tuple[str, ...] = ()
        self.reading = threading.RLock()
        self.reader = database
        self._writer = database if folder is None else None
        self._writing = self.reading if folder is None or read_only else threading.RLock()
        self._snapshot = Snapshot(alive=np.zeros(0, bool), segments=())
        self._seen = UNSEEN
        self._reload()

    def close(self) -> None:
        """Leave one database file without a journal beside it."""
        with self._writing, self.reading:
            self.reader.close()
            if self._writer is not None and self._writer is not self.reader:
                close_writer(self._writer, self.folder)

    def snapshot(self) -> Snapshot:
        """The rows as they are now, with what other processes have committed."""
        with self.reading, translated_errors(self.folder, self.reader):
            self.reader = self._followed(self.reader)
            if self.reader.execute("PRAGMA data_version").fetchone()[0] != self._seen:
                self._reload()
            return self._snapshot

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """What the database answers."""
        with self.reading, translated_errors(self.folder, self.reader):
            return self.reader.execute(sql, values).fetchall()

    @contextmanager
    def asking(self) -> Iterator[Connection]:
        """A connection for a question that may take long; others read and ask meanwhile, unless the store is in memory."""
        if self.folder is None or self._writer is self.reader:
            with self.reading:
                yield self.reader
            return
        with closing(self._same(connect_to_read(self.folder)[0])) as asker:
            yield asker

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Everything in the block is committed together, or nothing is."""
        with self._writing:
            database = self.open_writer()
            with transaction(database, None if self.read_only else self.folder) as change:
                yield change
            self._reload(change.made)

    def free_bytes(self) -> int:
        """What the database holds for nothing."""
        with self.reading, translated_errors(self.folder):
            return free_bytes(self.reader)

    def give_back(self) -> None:
        """Give that back to the disk."""
        if self.folder is not None and self.free_bytes():
            with self._writing, translated_errors(self.folder):
                give_back(self.open_writer())

    def _reload(self, made: Sequence[Segment] = ()) -> None:
        """Read the small tables again; segments known already keep their arrays."""
        with self.reading, translated_errors(self.folder, self.reader):
            while True:
                seen = self.reader.execute("PRAGMA data_version").fetchone()[0]
                old = self._snapshot
                found = read_manifest(self.reader, self.name, old.generation, old.records, max(old.numbers, default=0))
                snapshot = self._assembled(found, made)
                known = {segment.number for segment in old.segments}
                missing = [one for one in snapshot.segments if one.number not in known and not one.hold()]
                if not missing or self.reader.execute("PRAGMA data_version").fetchone()[0] == seen:
                    break  # a file that is missing though nothing was committed meanwhile is damage: whoever reads it says so
            self.checksums, self.metadata_names, self.encoder = found.checksums, found.metadata_names, found.encoder
            self._snapshot, self._seen = snapshot, seen

    def _assembled(self, found: Manifest, made: Sequence[Segment]) -> Snapshot:
        known = {segment.number: segment for segment in (*self._snapshot.segments, *made)}
        segments: list[Segment] = []
        for values in found.segments:
            segment = known.get(values[0]) or self._segment(values, found)
            moved = segment.first_row != values[1]
            segments.append(replace(segment, first_row=values[1]) if moved else segment)
        num_rows = sum(segment.num_rows for segment in segments)
        gone = found.records.rows_of(found.removed)
        if gone.size and not 0 <= gone.min() <= gone.max() < num_rows:
            raise StoreError(f"{self.name}: the database names rows beyond the {num_rows} in its segments: {CURE}")
        alive = np.ones(num_rows, bool)
        alive[gone] = False
        return Snapshot(alive=alive, segments=tuple(segments), generation=found.generation, records=found.records)

    def _segment(self, values: Sequence[Any], found: Manifest) -> Segment:
        """One that a row of the database tells of."""
        number, first_row, num_rows, embeddings, thumbnails, items = values
        assert self.folder is not None
        folder = self.folder / SEGMENTS
        rows = folder / file_name(number, "embeddings")
        if num_rows > MANY and rows.is_file() and num_rows * found.encoder.dim * 2 > rows.stat().st_size:
            raise StoreError(
                f"{self.name}: {rows.name} is too short for the {num_rows:,} rows that the database says: {CURE}"
            )

        def stored(kind: str, sha256: str, width: int, dtype: type[np.generic]) -> StoredArray:
            path, blocks = folder / file_name(number, kind), found.blocks.get((number, kind), b"")
            return StoredArray(sha256=sha256, shape=(num_rows, width), dtype=dtype, blocks=blocks, path=path)

        return Segment(
            number=number,
            first_row=first_row,
            num_rows=num_rows,
            embeddings=stored("embeddings", embeddings, found.encoder.dim, np.float16),
            thumbnails=stored("thumbnails", thumbnails, THUMBNAIL_VALUES, np.uint8) if thumbnails is not None else None,
            items_sha256=items,
        )

    def open_writer(self) -> Connection:
        """The connection that writes: to the folder, or to a copy in memory when the folder may not change."""
        if self._writer is None and self.read_only:
            overlay = connect_in_memory()
            with translated_errors(self.folder):
                self.reader.backup(overlay)
            self.reader.close()
            self.reader = self._writer = overlay
            self._reload()
        elif self._writer is None:
            assert self.folder is not None
            self.require_own()
            self._writer = self._same(connect_to_write(self.folder))
        return self._writer

    def require_own(self) -> None:
        """Raise StoreError unless the folder is the one that was opened, and holds nothing that leads out of it."""
        require_in_place(self.reader, self.folder)
        refuse_links(self.folder)

    def _same(self, database: Connection) -> Connection:
        """A new connection, if it is to the database that is read. Raises: StoreError when another took its place."""
        if database.file != self.reader.file:
            database.close()
            raise StoreError(moved(self.folder))
        return database

    def _followed(self, database: Connection) -> Connection:
        """The connection, or a new one where it shows the database as it was before somebody wrote to it."""
        if database.fixed_as is None or self.folder is None or state_of(self.folder) == database.fixed_as:
            return database
        fresh = self._same(connect_to_read(self.folder)[0])
        database.close()
        if database is self.reader:
            self._seen = UNSEEN
        return fresh
