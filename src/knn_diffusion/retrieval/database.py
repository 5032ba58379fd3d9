"""The SQLite side of the store: schema, connections, and SQLite's errors turned into ours."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from knn_diffusion.errors import StoreError
from knn_diffusion.retrieval.holder import holder
from knn_diffusion.retrieval.identity import (
    DATABASE,
    JOURNALS,
    Connection,
    file_id,
    in_place,
    link_in,
    moved,
    refuse_links,
    state_of,
)  # fmt: skip

FILTER_COLUMNS = ("id", "source", "key", "added_at")
ITEM_CHECKSUM = "crc32 INTEGER"
PURGED = "CREATE TABLE purged (first INTEGER PRIMARY KEY, count INTEGER NOT NULL)"
METADATA = "CREATE TABLE IF NOT EXISTS metadata (row INTEGER PRIMARY KEY, facts TEXT NOT NULL, crc32 INTEGER NOT NULL)"
BLOCKS = """CREATE TABLE IF NOT EXISTS blocks (number INTEGER NOT NULL, kind TEXT NOT NULL, digests BLOB NOT NULL,
    PRIMARY KEY (number, kind)) WITHOUT ROWID"""
HISTORY = "CREATE TABLE IF NOT EXISTS history (age INTEGER PRIMARY KEY, digest TEXT NOT NULL)"
SCHEMA = f"""
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE segments (number INTEGER PRIMARY KEY, first_row INTEGER NOT NULL, num_rows INTEGER NOT NULL,
    embeddings_sha256 TEXT NOT NULL, thumbnails_sha256 TEXT, items_sha256 TEXT NOT NULL);
CREATE TABLE items (row INTEGER PRIMARY KEY, id TEXT NOT NULL, source TEXT NOT NULL, key TEXT NOT NULL,
    content BLOB NOT NULL, added_at REAL NOT NULL, deleted_at REAL, {ITEM_CHECKSUM});
CREATE UNIQUE INDEX live_ids ON items (id) WHERE deleted_at IS NULL;
CREATE UNIQUE INDEX live_contents ON items (content) WHERE deleted_at IS NULL;
CREATE INDEX deleted_rows ON items (row) WHERE deleted_at IS NOT NULL;
CREATE TABLE previews (row INTEGER PRIMARY KEY, picture BLOB NOT NULL, crc32 INTEGER NOT NULL);
{PURGED};
{HISTORY};
{METADATA};
{BLOCKS};
"""
UPGRADE = (f"ALTER TABLE items ADD COLUMN {ITEM_CHECKSUM}", PURGED)
"""From format 1."""
LOCK_SECONDS = 10.0
_PARAMETERS = 500  # fewer than any SQLite allows in one statement
FREED_PAGES = 4096
"""Pages given back to the disk in one transaction, 16 MiB."""


def connect_in_memory() -> Connection:
    """An empty database that lives as long as the connection."""
    return _opened(":memory:")


def connect_to_write(folder: Path, *, create: bool = False) -> Connection:
    """A connection whose commits are on the disk when they return, and which leaves readers undisturbed (WAL)."""
    with translated_errors(folder):
        if create:  # with the permissions that the umask gives; SQLite would keep groups from writing
            os.close(os.open(folder / DATABASE, os.O_CREAT | os.O_WRONLY, 0o666))
        database = _connect(folder, "mode=rw")
        try:
            if create:
                database.execute("PRAGMA auto_vacuum=INCREMENTAL")
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            database.execute("PRAGMA secure_delete=ON")
        except BaseException:
            database.close()
            raise
        return database


def connect_to_read(folder: Path) -> tuple[Connection, bool]:
    """A connection, and whether the folder must not change: it is sealed, may not be written, or holds links.

    Nothing is created beside a sealed database: it may lie in a package.
    """
    refuse_links(folder, JOURNALS)  # SQLite may write to a journal that it finds, and deletes it
    path = folder / DATABASE
    writable = os.access(path, os.W_OK) and os.access(folder, os.W_OK) and link_in(folder) is None
    with translated_errors(folder):
        if not writable:
            return _connect_without_writing(folder), True
        database = _connect(folder, "mode=rw")
        try:
            refuse_programs(database, str(folder))
            found = database.execute("SELECT value FROM settings WHERE name = 'sealed'").fetchone()
        except BaseException:
            database.close()
            raise
        if not _unfinished(folder) and found and found[0] == "yes":
            database.close()
            return _connect(folder, "mode=ro&immutable=1"), True
        return database, False


def refuse_programs(database: sqlite3.Connection, name: str) -> None:
    """Raise StoreError when the database holds anything but tables and indexes: a view in a table's place could have no end."""
    sql = "SELECT name FROM sqlite_master WHERE type NOT IN ('table', 'index') OR sql LIKE 'CREATE VIRTUAL%' LIMIT 1"
    for (found,) in database.execute(sql):
        raise StoreError(
            f"expected only tables in {name}/{DATABASE}, it holds {str(found)[:40]!r}, which is none: get an intact copy"
        )


def _connect_without_writing(folder: Path) -> Connection:
    """A connection that follows what others write. Where SQLite must have a journal to do so and there is none, it shows the
    database as it is now, and notes that, so that `LiveState` opens it again when it changes."""
    database = _connect(folder, "mode=ro")
    try:
        database.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        database.close()
        code = error.sqlite_errorcode
        needs_journal = code & 0xFF == sqlite3.SQLITE_CANTOPEN or code == sqlite3.SQLITE_READONLY_DIRECTORY
        if not needs_journal or _unfinished(folder):
            raise
    else:
        return database
    before = state_of(folder)
    database = _connect(folder, "mode=ro&immutable=1")
    database.fixed_as = before
    return database


def _unfinished(folder: Path) -> bool:
    """True if the database's journal holds something."""
    journal = folder / f"{DATABASE}-wal"
    return journal.is_file() and journal.stat().st_size > 0


def close_writer(database: Connection, folder: Path | None) -> None:
    """Close and leave one file without a journal, unless another process still reads: then that is left to it.

    The journal is deleted by its path, so nothing is tidied where another index lies there by now.
    """
    if not in_place(database, folder):
        database.close()
        return
    try:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode=DELETE")
    except (sqlite3.OperationalError, sqlite3.ProgrammingError):
        pass  # somebody else reads, or it is closed already
    finally:
        database.close()


def free_bytes(database: sqlite3.Connection) -> int:
    """What `give_back` would free; 0 for a database made without that possibility (by format 1)."""
    if database.execute("PRAGMA auto_vacuum").fetchone()[0] != 2:
        return 0
    return int(database.execute("PRAGMA freelist_count").fetchone()[0]) * _page_size(database)


def give_back(database: sqlite3.Connection) -> None:
    """Give pages that hold nothing back to the disk, some at a time so that other writers need not wait."""
    while (left := free_bytes(database)) > 0:
        database.execute(f"PRAGMA incremental_vacuum({FREED_PAGES})").fetchall()
        if free_bytes(database) >= left:
            return


@contextmanager
def translated_errors(folder: Path | None, database: Connection | None = None) -> Iterator[None]:
    """Raise SQLite's errors as StoreError: in use and by whom, not writable, closed, moved away, or damaged."""
    try:
        yield
    except sqlite3.Error as error:
        name, code = str(folder or "the index in memory"), getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            text = f"{name} is in use by another writer{holder(folder)}"
        elif isinstance(error, sqlite3.ProgrammingError) and "closed" in str(error):
            text = f"{name} was closed here: open it again"
        elif database is not None and not in_place(database, folder):
            text = moved(folder)
        elif code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            text = (
                f"{name} could not be read or written ({error}): free space or change permissions; nothing was changed"
            )
        else:
            text = f"{name} holds a damaged {DATABASE} ({error}): restore a copy or build the index again"
        raise StoreError(text) from None


def text(value: str) -> str:
    """Text that a database can hold, also for a file name that is no valid UTF-8."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def pieces(values: list[Any]) -> Iterator[list[Any]]:
    """The values in lists that one statement takes as parameters."""
    return (values[start : start + _PARAMETERS] for start in range(0, len(values), _PARAMETERS))


def _page_size(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA page_size").fetchone()[0])


def _connect(folder: Path, options: str) -> Connection:
    """A connection to the database at the path of a folder that knows which file it opened."""
    path = folder / DATABASE
    while True:
        before = file_id(path)
        database = _opened(f"file:{quote(os.fsencode(path.absolute()))}?{options}")
        if file_id(path) == before:
            database.file = before
            return database
        database.close()  # another one took its place meanwhile


def _opened(place: str) -> Connection:
    return sqlite3.connect(
        place,
        uri=place.startswith("file:"),
        isolation_level=None,
        check_same_thread=False,
        timeout=LOCK_SECONDS,
        factory=Connection,
    )
