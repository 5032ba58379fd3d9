"""Whose a folder is: whether the index at a path is still the one that was opened, and what in it may lead elsewhere.

A database stays readable and writable after its folder was moved, deleted or replaced, but segments are found by path. So
every change first holds the open database against the one that lies at the path now, and again before it deletes anything.
Device and inode tell them apart, as in SQLite itself: an inode is not given to another file while a connection holds it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from knn_diffusion.errors import StoreError

DATABASE, SEGMENTS, CACHE = "store.sqlite", "segments", "cache"
JOURNALS = tuple(DATABASE + end for end in ("-journal", "-wal", "-shm"))

FileId = tuple[int, int]
"""Device and inode."""


class Connection(sqlite3.Connection):
    """A connection that knows which file it opened, None in memory."""

    file: FileId | None = None
    fixed_as: tuple[object, ...] | None = None
    """State of the files when the database was opened as if it never changed, None when SQLite follows changes itself."""


def file_id(path: Path) -> FileId | None:
    """Which file lies at a path, None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def state_of(folder: Path) -> tuple[object, ...]:
    """Another value when the database in a folder was written to or replaced."""

    def state(path: Path) -> tuple[int, ...]:
        try:
            status = path.stat()
        except OSError:
            return ()
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    return tuple(state(folder / name) for name in (DATABASE, *JOURNALS[:2]))


def in_place(database: Connection, folder: Path | None) -> bool:
    """True if the database at the path of the folder is the one that is open."""
    return folder is None or database.file is None or file_id(folder / DATABASE) == database.file


def require_in_place(database: Connection, folder: Path | None) -> None:
    """Raise StoreError when another index, or none, lies at the path of the folder by now."""
    if not in_place(database, folder):
        raise StoreError(moved(folder))


def moved(folder: Path | None) -> str:
    """The message for a folder that is not the one that was opened."""
    return f"{folder} was moved, deleted or replaced after it was opened here: open the index again where it is now"


def link_in(folder: Path, names: Sequence[str] = (SEGMENTS, CACHE, DATABASE, *JOURNALS)) -> str | None:
    """The name of a link in an index folder, through which a writer would change files elsewhere; None without one."""
    return next((name for name in names if (folder / name).is_symlink()), None)


def refuse_links(folder: Path | None, names: Sequence[str] = (SEGMENTS, CACHE, DATABASE, *JOURNALS)) -> None:
    """Raise StoreError when a change would leave the folder through a link."""
    if folder is not None and (name := link_in(folder, names)) is not None:
        raise StoreError(
            f"expected an index folder that holds its own files, {folder / name} is a link to {os.readlink(folder / name)}: "
            "replace the link by what it points to"
        )
