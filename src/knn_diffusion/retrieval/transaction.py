"""One change of a store, committed as a whole or not at all: rows of the database, and the files that they name.

A file is written to a temporary name, synced and renamed before the commit that names it. The number of a segment is
larger than that of any file there is, and what no commit names is deleted only after a commit of our own: a commit whose
sync failed may still come back after a crash, and finds its files. Deleted are only files with the names of segments, and
nothing once another index lies at the path.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from jaxtyping import Float16, UInt8

from knn_diffusion.checkpoint import TEMPORARY
from knn_diffusion.errors import KnnDiffusionError
from knn_diffusion.retrieval.database import translated_errors
from knn_diffusion.retrieval.holder import noted
from knn_diffusion.retrieval.identity import SEGMENTS, Connection, in_place, refuse_links, require_in_place
from knn_diffusion.retrieval.items import Facts, item_crc, item_line, items_digest
from knn_diffusion.retrieval.manifest import get, sign, upgrade
from knn_diffusion.retrieval.segments import Segment, file_name
from knn_diffusion.retrieval.stored_array import StoredArray

OWN_FILE = re.compile(rf"(\d{{8}})\.(embeddings|thumbnails)\.npy|{re.escape(TEMPORARY)}\w+")
"""Names of files that this module writes: those of segments, and what a killed process left half-written."""


class Transaction:
    """An open transaction, and the segments made in it."""

    def __init__(self, database: Connection, folder: Path | None) -> None:
        self.database = database
        self.made: list[Segment] = []
        self.dropped = False
        """Whether segments were taken out."""
        self._folder = folder / SEGMENTS if folder is not None else None

    def append(
        self,
        items: Sequence[Facts],
        vectors: Float16[np.ndarray, "items dim"],
        thumbnails: UInt8[np.ndarray, "items values"] | None,
        first_row: int,
        first_record: int,
    ) -> None:
        """Write a segment of new images behind all others."""
        lines = list(map(item_line, items))
        segment = new_segment(lines, vectors, thumbnails)
        segment.first_row, segment.number = first_row, self._next_number()
        self.made.append(segment)
        if self._folder is not None:
            segment.write(self._folder)
        self.name(segment)
        sql = "INSERT INTO items (row, id, source, key, content, added_at, crc32) VALUES (?, ?, ?, ?, ?, ?, ?)"
        numbered = enumerate(zip(items, lines, strict=True), first_record)
        self.database.executemany(sql, [(record, *one, item_crc(record, line)) for record, (one, line) in numbered])

    def adopt(self, segment: Segment) -> None:
        """Take over a segment that was written elsewhere on the same disk."""
        segment.number = self._next_number()
        self.made.append(segment)
        if self._folder is None:
            return
        try:
            for kind, array in segment.arrays().items():
                array.move(self._folder / file_name(segment.number, kind))
            sync(self._folder)
        except OSError as error:
            raise KnnDiffusionError(
                f"{self._folder} could not be written ({error.strerror}): free space or change permissions; nothing was changed"
            ) from None

    def name(self, segment: Segment) -> None:
        """Put a segment into the database."""
        place = (segment.number, segment.first_row, segment.num_rows)
        arrays = segment.arrays()
        digests = [arrays[kind].sha256 if kind in arrays else None for kind in ("embeddings", "thumbnails")]
        self.database.execute(
            "INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?)", (*place, *digests, segment.items_sha256)
        )
        blocks = [(segment.number, kind, array.blocks) for kind, array in arrays.items() if array.blocks]
        self.database.executemany("INSERT INTO blocks VALUES (?, ?, ?)", blocks)

    def leftovers(self) -> list[Path]:
        """Files that nothing will name: of a process that died, of a full disk, or replaced by a compaction."""
        if self._folder is None or not (self.made or self.dropped):
            return []
        named = {f"{number:08d}" for (number,) in self.database.execute("SELECT number FROM segments")}
        own = [(path, match[1]) for path in self._folder.iterdir() if (match := OWN_FILE.fullmatch(path.name))]
        return [path for path, number in own if number not in named]

    def _next_number(self) -> int:
        """A number that no segment ever had."""
        known = [self.database.execute("SELECT ifnull(max(number), 0) FROM segments").fetchone()[0]]
        known += [int(get(self.database, "last_segment") or 0), *(segment.number for segment in self.made)]
        names = os.listdir(self._folder) if self._folder is not None else []
        known += [int(name[:8]) for name in names if name[:8].isdecimal()]
        return 1 + max(known)


@contextmanager
def transaction(database: Connection, folder: Path | None) -> Iterator[Transaction]:
    """Everything in the block is committed together, or nothing is.

    Args:
        folder: of the store, None for one whose arrays stay in memory.

    Raises: StoreError when another process writes, naming it; when the folder is not the one that was opened, or has links.
    """
    with translated_errors(folder, database):
        require_in_place(database, folder)
        refuse_links(folder)
        database.execute("BEGIN IMMEDIATE")
        change, leftovers, committing = Transaction(database, folder), list[Path](), False
        try:
            with noted(folder):
                upgrade(database)
                yield change
                sign(database)
                leftovers = change.leftovers()
                require_in_place(database, folder)
            committing = True
            database.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            for segment in change.made if not committing and in_place(database, folder) else ():
                segment.delete()
            raise
        require_in_place(database, folder)  # or what was committed is not in the index that lies there now
    for path in leftovers:
        with suppress(OSError):
            path.unlink()


def new_segment(
    lines: Sequence[bytes],
    vectors: Float16[np.ndarray, "items dim"],
    thumbnails: UInt8[np.ndarray, "items values"] | None,
) -> Segment:
    """A segment in memory with its digests, still without number and place; of its items only their lines are needed."""
    return Segment(
        number=0,
        first_row=0,
        num_rows=len(lines),
        embeddings=StoredArray.of(vectors),
        thumbnails=None if thumbnails is None else StoredArray.of(thumbnails),
        items_sha256=items_digest(lines),
    )


def sync(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
