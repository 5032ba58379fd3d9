"""The small tables of a store's database: settings, segments, removed and purged images; signed, and verified when read.

SQLite notices a page that makes no sense, but not one bit that flipped inside a number or a text. So the last step of
every transaction is a digest over these tables. It covers the removed images by a sum that a removal adds to.

Beside them stands the history: a chain of digests with a link for every append and every compaction. What was made from
the images at one age still holds while the store's history has that link, whatever was added and purged since.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from knn_diffusion.config import parse_json
from knn_diffusion.errors import StoreError
from knn_diffusion.retrieval.database import BLOCKS, HISTORY, METADATA, UPGRADE, refuse_programs
from knn_diffusion.retrieval.identity import DATABASE
from knn_diffusion.retrieval.items import EncoderIdentity
from knn_diffusion.retrieval.records import Records
from knn_diffusion.retrieval.stored_array import CURE

FORMAT_VERSION = 2
"""Of new stores. Format 1 knew no compaction, no signature and no checksum of items; writing to it makes it format 2."""
READABLE = ("1", "2")
METADATA_NAMES, METADATA_ROWS = "metadata_names", "metadata_rows"
OWN_SETTINGS = (
    "format_version",
    "encoder",
    "sealed",
    "generation",
    "last_segment",
    "removed",
    "purged",
    "previews",
    METADATA_NAMES,
    METADATA_ROWS,
    "signature",
)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Manifest:
    """What the small tables say, at one moment."""

    generation: int
    checksums: bool
    """Whether items have some of their own."""
    segments: list[tuple[Any, ...]]
    """Number, first row, rows, and digests of embeddings, thumbnails and items, in the order of their rows."""
    removed: Int64[np.ndarray, "removed"]
    """Records of removed images that are still on the disk, ascending."""
    records: Records
    blocks: dict[tuple[int, str], bytes]
    """Digests of blocks of the segments that were not known, by number and kind of array, as far as there are any."""
    encoder: EncoderIdentity
    metadata_names: tuple[str, ...]
    """Under which something is known of images, beside their provenance."""


def read_manifest(
    database: sqlite3.Connection, name: str, generation: int, records: Records, last_known: int
) -> Manifest:
    """The small tables, verified, in one read transaction.

    Args:
        generation, records: as they were read last, to spare reading what has not changed.
        last_known: the number of the last segment that is known.

    Raises: StoreError when they are damaged or of another format.
    """
    refuse_programs(database, name)
    database.execute("BEGIN")
    try:
        settings = dict(database.execute("SELECT name, value FROM settings"))
        segments = database.execute("SELECT * FROM segments ORDER BY first_row").fetchall()
        found = database.execute("SELECT row FROM items WHERE deleted_at IS NOT NULL ORDER BY row").fetchall()
        version = settings.get("format_version")
        if version not in READABLE:
            raise StoreError(
                f"{name} has format {version}, this version reads {' and '.join(READABLE)}: upgrade knn-diffusion"
            )
        removed = np.array([row for (row,) in found], np.int64)
        if version != "1":  # which was not signed
            _verify(settings, segments, removed, name)
        now = int(settings.get("generation", "0"))
        if now != generation:
            records = _read_records(database, settings, name)
        blocks = _read_blocks(database, last_known)
    finally:
        database.execute("COMMIT")
    return Manifest(
        generation=now,
        checksums=version != "1",
        segments=segments,
        removed=removed,
        records=records,
        blocks=blocks,
        encoder=_read_encoder(settings, name),
        metadata_names=_read_names(settings, name),
    )


def sign(database: sqlite3.Connection) -> None:
    """The last step of a transaction."""
    _remember(database)
    put(database, "signature", _signature(*_signed(database)))


def put(database: sqlite3.Connection, name: str, value: object) -> None:
    """Write one setting."""
    database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, str(value)))


def get(database: sqlite3.Connection, name: str) -> str | None:
    """One setting, None when it was never set."""
    found = database.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
    return None if found is None else str(found[0])


def add_removed(database: sqlite3.Connection, records: Int[np.ndarray, "records"], sign: int = 1) -> None:
    """Count records as removed, or with sign -1 no longer as removed but as purged."""
    total = int(get(database, "removed") or 0) + sign * checksum(records)
    put(database, "removed", total % 2**64)


def count_previews(database: sqlite3.Connection, more: int) -> None:
    """After a change of the previews keep their number, which the check compares: a lost one looks like one never added."""
    known = get(database, "previews")
    now = database.execute("SELECT count(*) FROM previews").fetchone()[0] if known is None else int(known) + more
    put(database, "previews", now)


def purge(database: sqlite3.Connection, records: Records, generation: int) -> None:
    """Say which records are gone from now on."""
    database.execute("DELETE FROM purged")
    runs = zip(records.firsts.tolist(), records.counts.tolist(), strict=True)
    database.executemany("INSERT INTO purged VALUES (?, ?)", runs)
    put(database, "purged", records.digest())
    put(database, "generation", generation)


def upgrade(database: sqlite3.Connection) -> None:
    """Bring an older store to this format, inside a transaction; items of format 1 stay without checksums of their own."""
    if get(database, "format_version") == "1":
        for statement in UPGRADE:
            database.execute(statement)
        put(database, "format_version", FORMAT_VERSION)
        found = database.execute("SELECT row FROM items WHERE deleted_at IS NOT NULL").fetchall()
        add_removed(database, np.array([row for (row,) in found], np.int64))
    for statement in (HISTORY, METADATA, BLOCKS):
        database.execute(statement)
    _remember(database)


def checksum(records: Int[np.ndarray, "records"]) -> int:
    """Sum of the records' mixed bits (splitmix64), in any order."""
    bits = records.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((bits ^ (bits >> np.uint64(31))).sum(dtype=np.uint64))


def _remember(database: sqlite3.Connection) -> None:
    """Add a link to the history if images were added or purged since the last one."""
    sql = "SELECT (SELECT ifnull(sum(num_rows), 0) FROM segments) + (SELECT ifnull(sum(count), 0) FROM purged)"
    age = int(database.execute(sql).fetchone()[0]) + int(get(database, "generation") or 0)
    last = database.execute("SELECT age, digest FROM history ORDER BY age DESC LIMIT 1").fetchone() or (-1, "")
    if last[0] != age:
        held = [digest for (digest,) in database.execute("SELECT embeddings_sha256 FROM segments ORDER BY first_row")]
        told = " ".join([last[1], get(database, "purged") or "", *held])
        database.execute("INSERT INTO history VALUES (?, ?)", (age, hashlib.sha256(told.encode()).hexdigest()))


def _verify(settings: dict[str, str], segments: list[Any], removed: Int64[np.ndarray, "removed"], name: str) -> None:
    signature = settings.pop("signature", "")
    sound = signature == _signature(settings, segments) and int(settings.get("removed", "0")) == checksum(removed)
    if not sound:
        raise StoreError(f"{name} holds a damaged {DATABASE} (its list of segments is not the signed one): {CURE}")


def _signed(database: sqlite3.Connection) -> tuple[dict[str, str], list[Any]]:
    settings = dict(database.execute("SELECT name, value FROM settings WHERE name != 'signature'"))
    return settings, database.execute("SELECT * FROM segments ORDER BY first_row").fetchall()


def _signature(settings: dict[str, str], segments: list[Any]) -> str:
    told = json.dumps([sorted(settings.items(), key=repr), segments], default=repr)
    return hashlib.sha256(told.encode()).hexdigest()


def _read_encoder(settings: dict[str, str], name: str) -> EncoderIdentity:
    try:
        return EncoderIdentity(**parse_json(settings.get("encoder", "")))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{name} does not say which encoder made it ({error}): {CURE}") from None


def _read_names(settings: dict[str, str], name: str) -> tuple[str, ...]:
    try:
        return tuple(map(str, parse_json(settings.get(METADATA_NAMES, "[]"))))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{name} does not say which metadata it holds ({error}): {CURE}") from None


def _read_blocks(database: sqlite3.Connection, last_known: int) -> dict[tuple[int, str], bytes]:
    """Not signed: what they spare is read after all where they are wrong. Older stores have none."""
    if not database.execute("SELECT name FROM sqlite_master WHERE name = 'blocks'").fetchone():
        return {}
    found = database.execute("SELECT number, kind, digests FROM blocks WHERE number > ?", (last_known,))
    return {(number, kind): digests for number, kind, digests in found if isinstance(digests, bytes)}


def _read_records(database: sqlite3.Connection, settings: dict[str, str], name: str) -> Records:
    found = database.execute("SELECT first, count FROM purged ORDER BY first").fetchall()
    try:
        runs = np.array(found, np.int64).reshape(-1, 2).T.copy()
        records = Records(firsts=runs[0], counts=runs[1])
    except (ValueError, TypeError, OverflowError):
        records = Records.complete()
    if records.digest() != settings.get("purged"):
        raise StoreError(f"{name} holds a damaged {DATABASE} (its purged rows are not the signed ones): {CURE}")
    return records
