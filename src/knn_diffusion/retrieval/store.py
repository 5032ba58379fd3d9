"""The truth of an image index: which images there are, where they came from, and their embeddings.

    store.sqlite                       encoder, settings, segments with their digests, items, previews
    segments/00000001.embeddings.npy   float16 [rows, dim], unit vectors
    segments/00000001.thumbnails.npy   uint8 [rows, 192], 8×8 RGB pictures; missing for vectors without pictures
    cache/                             whatever can be made again from the above

A row is the place of an image in all segments laid end to end. Rows are only ever appended and never used again; removing
an image marks its row. A segment is written to a temporary file, synced and renamed before the transaction that names it
commits, so after a crash a batch is there as a whole or not at all. Every segment is verified against its digest when it
is first read. Other tools can read the segments with `numpy.load` and the database with `sqlite3`.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float16, Int, UInt8

from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.retrieval.database import (
    DATABASE,
    SCHEMA,
    close_writer,
    connect_in_memory,
    connect_to_read,
    connect_to_write,
    rows_where,
    text,
    translated_errors,
)  # fmt: skip
from knn_diffusion.retrieval.segments import (
    CURE,
    THUMBNAIL_VALUES,
    Segment,
    Snapshot,
    bytes_digest,
    items_digest,
    stored_rows,
)  # fmt: skip

FORMAT_VERSION = 1
ID_LENGTH = 16
_PIECE = 500  # fewer than the parameters that any SQLite allows in one statement
_OWN_SETTINGS = ("format_version", "encoder", "sealed")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderIdentity:
    """Which joint encoder made the vectors: its name, the fingerprint of its weights and preprocessing, and its width."""

    name: str
    fingerprint: str
    dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image: a stable id, its provenance (file or shard, key inside it), and the SHA-256 of its content in hexadecimal.

    An empty id asks the store to take the first 16 digits of the content digest.
    """

    source: str
    content: str
    key: str = ""
    id: str = ""


class Store:
    """Images, provenance and embeddings, in a folder or in memory.

    Any number of threads and processes may read; one writes at a time. A read-only store takes additions and removals
    too, but only in memory: they are gone unless `copy_to` saves them elsewhere.
    """

    def __init__(self, database: sqlite3.Connection, folder: Path | None, *, read_only: bool) -> None:
        self.folder, self.read_only = folder, read_only
        self._reader = database
        self._writer = database if folder is None else None
        self._reading = threading.RLock()
        # In memory both sides share one connection, so a reader waits for the end of a transaction.
        self._writing = self._reading if folder is None or read_only else threading.RLock()
        self._pending: dict[int, Segment] = {}
        self._snapshot = Snapshot(alive=np.zeros(0, bool), segments=())
        self._seen = -1
        self.encoder = self._read_identity()
        self._reload()

    @classmethod
    def create(cls, folder: Path | None, encoder: EncoderIdentity) -> Store:
        """A new, empty store in `folder`, or in memory when that is None.

        Raises: UsageError when the folder exists and is not empty; StoreError when it cannot be written.
        """
        if folder is not None:
            _make_new_folder(folder)
        database = connect_in_memory() if folder is None else connect_to_write(folder, create=True)
        values = {"format_version": str(FORMAT_VERSION), "encoder": json.dumps(asdict(encoder)), "sealed": "no"}
        with translated_errors(folder):
            database.executescript("BEGIN;" + SCHEMA)
            database.executemany("INSERT INTO settings VALUES (?, ?)", values.items())
            database.execute("COMMIT")
        if folder is None:
            return cls(database, None, read_only=False)
        close_writer(database)
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
        with self._writing, self._reading:
            self._reader.close()
            if self._writer is not None and self._writer is not self._reader:
                close_writer(self._writer)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """How messages call the store."""
        return str(self.folder) if self.folder is not None else "the index in memory"

    # Reading

    def __len__(self) -> int:
        return int(self.snapshot().alive.sum())

    def snapshot(self) -> Snapshot:
        """The rows as they are now, with what other processes have committed."""
        with self._reading, translated_errors(self.folder):
            if self._reader.execute("PRAGMA data_version").fetchone()[0] != self._seen:
                self._reload()
            return self._snapshot

    def setting(self, name: str) -> str | None:
        """A text kept with the store, None when it was never set."""
        found = self._query("SELECT value FROM settings WHERE name = ?", (name,))
        return found[0][0] if found else None

    def rows_of(self, ids: Sequence[str]) -> Int[np.ndarray, "ids"]:
        """The row of each image that is not removed, -1 for ids the store does not hold."""
        found: dict[str, int] = {}
        for piece in _pieces([text(one) for one in ids]):
            marks = ",".join("?" * len(piece))
            found.update(self._query(f"SELECT id, row FROM items WHERE deleted_at IS NULL AND id IN ({marks})", piece))
        return np.array([found.get(text(one), -1) for one in ids], np.int64)

    def items(self, rows: Int[np.ndarray, "rows"]) -> list[Item]:
        """Id and provenance of each row. Raises: StoreError when the database does not hold one."""
        found: dict[int, Item] = {}
        for piece in _pieces([int(row) for row in rows]):
            sql = f"SELECT row, id, source, key, content FROM items WHERE row IN ({','.join('?' * len(piece))})"
            for row, id_, source, key, content in self._query(sql, piece):
                found[row] = Item(id=id_, source=source, key=key, content=content.hex())
        if missing := [int(row) for row in rows if int(row) not in found]:
            raise StoreError(f"{self.name}: row {missing[0]} is not in the database: {CURE}")
        return [found[int(row)] for row in rows]

    def id_of_content(self, content: str) -> str | None:
        """The id of the image with this content digest, None when it is not there or removed."""
        sql = "SELECT id FROM items WHERE deleted_at IS NULL AND content = ?"
        found = self._query(sql, (bytes.fromhex(content),))
        return found[0][0] if found else None

    def embeddings(
        self, rows: Int[np.ndarray, "rows"], snapshot: Snapshot | None = None
    ) -> Float16[np.ndarray, "rows dim"]:
        """The stored vectors of these rows, copied. Raises: StoreError when a segment is missing or damaged."""
        out = np.empty((len(rows), self.encoder.dim), np.float16)
        for places, local, segment in (snapshot or self.snapshot()).split(rows):
            out[places] = segment.read_embeddings(self.encoder.dim).take(local, axis=0)
        return out

    def thumbnails(
        self, rows: Int[np.ndarray, "rows"], snapshot: Snapshot | None = None
    ) -> tuple[UInt8[np.ndarray, "rows values"], Bool[np.ndarray, "rows"]]:
        """The 8×8 pictures of these rows, and which rows have one (the others are zeros)."""
        out, known = np.zeros((len(rows), THUMBNAIL_VALUES), np.uint8), np.zeros(len(rows), bool)
        for places, local, segment in (snapshot or self.snapshot()).split(rows):
            if (found := segment.read_thumbnails()) is not None:
                out[places], known[places] = found[local], True
        return out, known

    def preview(self, row: int) -> bytes | None:
        """The small encoded picture of a row, None when it was added without."""
        found = self._query("SELECT picture FROM previews WHERE row = ?", (row,))
        return found[0][0] if found else None

    def matching(self, where: str, snapshot: Snapshot | None = None) -> Bool[np.ndarray, "rows"]:
        """Which rows are not removed and fulfil an SQL condition over id, source, key and added_at (seconds since 1970).

        Raises: UsageError when it is no condition, or names anything else.
        """
        snapshot = snapshot or self.snapshot()
        with self._reading:
            rows = rows_where(self._reader, where)
        mask = np.zeros(snapshot.num_rows, bool)
        mask[rows[rows < snapshot.num_rows]] = True
        return mask & snapshot.alive

    # Writing

    def append(
        self,
        items: Sequence[Item],
        embeddings: Float[np.ndarray, "items width"],
        thumbnails: UInt8[np.ndarray, "items values"] | None = None,
        previews: Sequence[bytes | None] | None = None,
    ) -> Bool[np.ndarray, "items"]:
        """Add images as one segment: all of them or, after an error, none.

        Args:
            embeddings: vectors of any length but zero; what is stored is their direction in float16.
            previews: an encoded picture to show each image by.

        Returns: which were added; the others were there already, with the same content.
        Raises: FingerprintError for another width; UsageError for vectors that are zero or not finite and for an id taken
            by other content; KnnDiffusionError when the disk is full; StoreError when another process writes.
        """
        vectors = stored_rows(embeddings, self.encoder.dim, f"{self.name}, embeddings")
        with self._transaction() as database:
            added, named = _choose(database, items)
            chosen = np.flatnonzero(added)
            if not len(chosen):
                return added
            pictures = None if thumbnails is None else np.ascontiguousarray(thumbnails[chosen])
            first_row = self._add_segment(database, named, vectors[chosen], pictures)
            shown = [previews[int(place)] for place in chosen] if previews is not None else []
            rows = [(first_row + n, picture, zlib.crc32(picture)) for n, picture in enumerate(shown) if picture]
            database.executemany("INSERT INTO previews VALUES (?, ?, ?)", rows)
        return added

    def remove(self, ids: Sequence[str]) -> None:
        """Remove images; the next search does not see them.

        Raises: UsageError naming the first unknown id, before anything is removed.
        """
        with self._transaction() as database:
            rows = [int(row) for row in self.rows_of(ids)]
            if unknown := [one for one, row in zip(ids, rows, strict=True) if row < 0]:
                raise UsageError(
                    f"expected ids of images in {self.name}, got {unknown[0]!r} ({len(unknown)} of {len(rows)} unknown): "
                    "search the index to see its ids; nothing was removed"
                )
            now = time.time()
            database.executemany("UPDATE items SET deleted_at = ? WHERE row = ?", [(now, row) for row in rows])
            database.executemany("DELETE FROM previews WHERE row = ?", [(row,) for row in rows])

    def set_setting(self, name: str, value: str) -> None:
        """Keep a text with the store."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def copy_to(self, folder: Path, *, sealed: bool = False) -> None:
        """Write everything that is not removed into the empty folder, in few segments.

        Args:
            sealed: the copy opens read-only and leaves no file beside its database, as a package needs it.
        """
        snapshot = self.snapshot()
        with Store.create(folder, self.encoder) as copy:
            for name, value in self._query("SELECT name, value FROM settings"):
                if name not in _OWN_SETTINGS:
                    copy.set_setting(name, value)
            for rows in snapshot.runs():
                pictures, known = self.thumbnails(rows, snapshot)
                previews = [self.preview(int(row)) for row in rows]
                vectors = self.embeddings(rows, snapshot)
                copy.append(self.items(rows), vectors, pictures if known.all() else None, previews)
            copy.set_setting("sealed", "yes" if sealed else "no")

    # Verifying

    def problems(self) -> list[str]:
        """Everything that is wrong with the store, each in a few words; empty for a sound one."""
        try:
            broken = [f"{DATABASE}: {found}" for (found,) in self._query("PRAGMA integrity_check") if found != "ok"]
            if broken:
                return broken[:1]
            segments = self.snapshot().segments
            listed = [problem for segment in segments for problem in self._segment_problems(segment)]
            total, expected = self._query("SELECT count(*) FROM items")[0][0], self.snapshot().num_rows
            pictures = self._query("SELECT row, picture, crc32 FROM previews")
        except StoreError as error:
            return [str(error)]
        if total != expected:
            listed.append(f"{DATABASE}: expected {expected} rows, found {total}")
        return listed + [
            f"the preview of row {row} is damaged" for row, picture, crc in pictures if zlib.crc32(picture) != crc
        ]

    def bytes_on_disk(self) -> int:
        """Size of all files of the store, in bytes; 0 in memory."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) if self.folder else 0

    # Inside

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._reading, translated_errors(self.folder):
            return self._reader.execute(sql, values).fetchall()

    def _read_identity(self) -> EncoderIdentity:
        version = self.setting("format_version")
        if version != str(FORMAT_VERSION):
            raise StoreError(
                f"{self.name} has format {version}, this version reads {FORMAT_VERSION}: upgrade knn-diffusion"
            )
        try:
            return EncoderIdentity(**json.loads(self.setting("encoder") or ""))
        except (ValueError, TypeError) as error:
            raise StoreError(f"{self.name} does not say which encoder made it ({error}): {CURE}") from None

    def _reload(self) -> None:
        """Read segments and removed rows again; segments known already keep their arrays."""
        with self._reading, translated_errors(self.folder):
            seen = self._reader.execute("PRAGMA data_version").fetchone()[0]
            self._reader.execute("BEGIN")
            found = self._reader.execute("SELECT * FROM segments ORDER BY number").fetchall()
            deleted = self._reader.execute("SELECT row FROM items WHERE deleted_at IS NOT NULL").fetchall()
            self._reader.execute("COMMIT")
            known = self._pending | {segment.number: segment for segment in self._snapshot.segments}
            segments = tuple(known.get(values[0]) or self._segment(*values) for values in found)
            num_rows = sum(segment.num_rows for segment in segments)
            gone = np.array([row for (row,) in deleted], np.int64)
            if gone.size and gone.max() >= num_rows:
                raise StoreError(f"{self.name}: the database names rows beyond the {num_rows} in its segments: {CURE}")
            alive = np.ones(num_rows, bool)
            alive[gone] = False
            self._snapshot, self._seen, self._pending = Snapshot(alive=alive, segments=segments), seen, {}

    def _segment(self, number: int, first_row: int, num_rows: int, *digests: Any) -> Segment:
        embeddings, thumbnails, items = digests
        return Segment(
            number=number,
            first_row=first_row,
            num_rows=num_rows,
            embeddings_sha256=embeddings,
            thumbnails_sha256=thumbnails,
            items_sha256=items,
            folder=self.folder / "segments" if self.folder is not None else None,
        )

    def _segment_problems(self, segment: Segment) -> Iterator[str]:
        yield from segment.file_problems()
        sql = "SELECT id, source, key, content, added_at FROM items WHERE row >= ? AND row < ? ORDER BY row"
        if (
            items_digest(self._query(sql, (segment.first_row, segment.first_row + segment.num_rows)))
            != segment.items_sha256
        ):
            yield f"{DATABASE}: the items of segment {segment.number} are not those that were added"

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything in the block is committed together, or nothing is."""
        with self._writing:
            database = self._open_writer()
            with translated_errors(self.folder):
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                    database.execute("COMMIT")
                except BaseException:
                    self._pending = {}
                    with suppress(sqlite3.Error):
                        database.execute("ROLLBACK")
                    raise
            self._reload()

    def _open_writer(self) -> sqlite3.Connection:
        """The connection that writes: to the folder, or to a copy in memory when the folder may not change."""
        if self._writer is None and self.read_only:
            overlay = connect_in_memory()
            with translated_errors(self.folder):
                self._reader.backup(overlay)
            self._reader.close()
            self._reader = self._writer = overlay
        elif self._writer is None:
            assert self.folder is not None
            self._writer = connect_to_write(self.folder)
        return self._writer

    def _add_segment(
        self,
        database: sqlite3.Connection,
        items: Sequence[Item],
        vectors: Float16[np.ndarray, "items dim"],
        thumbnails: UInt8[np.ndarray, "items values"] | None,
    ) -> int:
        """Write the arrays, then name them in the open transaction; the first row of the new segment."""
        sql = "SELECT ifnull(max(number), 0) + 1, ifnull(sum(num_rows), 0) FROM segments"
        number, first_row = database.execute(sql).fetchone()
        now = time.time()
        rows = [(item.id, text(item.source), text(item.key), bytes.fromhex(item.content), now) for item in items]
        pictures_digest = None if thumbnails is None else bytes_digest(thumbnails)
        values = (number, first_row, len(items), bytes_digest(vectors), pictures_digest, items_digest(rows))
        segment = self._segment(*values)
        segment.embeddings, segment.thumbnails = vectors, thumbnails
        if self.read_only or self.folder is None:
            segment.folder = None
        else:
            self._sweep(database)
            segment.write()
        self._pending = {number: segment}
        database.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?)", values)
        sql = "INSERT INTO items (row, id, source, key, content, added_at) VALUES (?, ?, ?, ?, ?, ?)"
        database.executemany(sql, [(first_row + place, *row) for place, row in enumerate(rows)])
        return int(first_row)

    def _sweep(self, database: sqlite3.Connection) -> None:
        """Delete segment files that no commit names: left by a process that died or a disk that was full."""
        assert self.folder is not None
        named = {f"{number:08d}" for (number,) in database.execute("SELECT number FROM segments")}
        for path in (self.folder / "segments").iterdir():
            if path.name.split(".")[0] not in named:
                with suppress(OSError):
                    path.unlink()


def _choose(database: sqlite3.Connection, items: Sequence[Item]) -> tuple[Bool[np.ndarray, "items"], list[Item]]:
    """Which items are new, and those with their ids."""
    added = np.zeros(len(items), bool)
    chosen: dict[str, Item] = {}
    contents: set[str] = set()
    live = "SELECT 1 FROM items WHERE deleted_at IS NULL AND "
    for place, item in enumerate(items):
        if (
            item.content in contents
            or database.execute(live + "content = ?", (bytes.fromhex(item.content),)).fetchone()
        ):
            continue
        for id_ in [text(item.id)] if item.id else [item.content[:ID_LENGTH], item.content]:
            if id_ not in chosen and not database.execute(live + "id = ?", (id_,)).fetchone():
                break
        else:
            raise UsageError(f"id {item.id!r} is taken by other content: choose another id or remove that image first")
        contents.add(item.content)
        chosen[id_] = replace(item, id=id_)
        added[place] = True
    return added, list(chosen.values())


def _make_new_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"expected a new folder for the index, {folder} exists: choose another or add to the index there"
        )
    try:
        (folder / "segments").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written ({error.strerror}): choose another place") from None


def _pieces(values: list[Any]) -> Iterator[list[Any]]:
    return (values[start : start + _PIECE] for start in range(0, len(values), _PIECE))
