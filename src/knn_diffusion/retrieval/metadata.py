"""Metadata of one's own: what is known of an image beside its provenance, such as a licence or a width, to filter by.

The table `metadata` holds a JSON object for each image that has any, with a checksum. The names that images ever had are
columns of a filter; they, and the number of such images, are settings, and signed with the others.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from knn_diffusion.config import parse_json
from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.retrieval.database import pieces, text
from knn_diffusion.retrieval.manifest import METADATA_NAMES, METADATA_ROWS, get, put
from knn_diffusion.retrieval.stored_array import CURE

if TYPE_CHECKING:
    from knn_diffusion.retrieval.live import LiveState

Value = str | int | float | bool
Metadata = Mapping[str, Value]

MAX_NAMES = 64
"""Of all images of a store together."""
RESERVED = ("row", "id", "source", "key", "content", "added_at", "deleted_at", "crc32")
"""The store's own columns."""
GAPS = frozenset(("", "nan", "-nan", "n/a", "#n/a", "null", "<na>"))
"""Texts by which programs write that nothing is known, in small letters."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HELD: dict[type[Value], set[str]] = {
    bool: {"true", "false"},
    int: {"integer"},
    float: {"integer", "real"},
    str: {"integer", "real", "text", "true", "false"},
}
"""Types of JSON, as SQLite calls them, that each of ours holds."""
_LEAST, _MOST = -(2**63), 2**63 - 1
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def keep_metadata(database: sqlite3.Connection, metadata: Sequence[Mapping[str, Any]], first_record: int) -> None:
    """Write what is known of new images, inside a transaction.

    Raises: UsageError for a name or a value that cannot be metadata, and for more than MAX_NAMES names.
    """
    if not any(metadata):
        return
    names = _Names(parse_json(get(database, METADATA_NAMES) or "[]"))
    rows = []
    for record, one in enumerate(metadata, first_record):
        if facts := {names.spelled(name): value for name, value in checked(one).items()}:
            told = _JSON.encode(facts)
            rows.append((record, told, metadata_crc(record, told)))
    database.executemany("INSERT INTO metadata VALUES (?, ?, ?)", rows)
    if rows:
        put(database, METADATA_NAMES, json.dumps(names.all))
        _count(database, len(rows))


def drop_metadata(database: sqlite3.Connection, records: Int[np.ndarray, "records"]) -> None:
    """Delete what was known of purged images, inside a transaction."""
    if get(database, METADATA_ROWS):
        numbers = [(record,) for record in records.tolist()]
        deleted = database.executemany("DELETE FROM metadata WHERE row = ?", numbers)
        _count(database, -max(deleted.rowcount, 0))


def read_metadata(live: LiveState, records: Sequence[int]) -> dict[int, dict[str, Value]]:
    """What is known of those of the records that have metadata. Raises: StoreError when it is damaged."""
    found = {}
    for piece in pieces(list(records)):
        sql = f"SELECT row, facts, crc32 FROM metadata WHERE row IN ({','.join('?' * len(piece))})"
        for record, facts, crc in live.query(sql, piece):
            if not metadata_is_sound(record, facts, crc):
                raise StoreError(f"{live.name}: the metadata of row {record} is damaged: {CURE}")
            found[record] = parse_json(facts)
    return found


def metadata_kinds(live: LiveState) -> dict[str, type[Value]]:
    """The type that holds all values of each name in use: bool, int, float, or str where they have nothing else in common."""
    if not live.metadata_names:
        return {}
    sql = "SELECT key, type FROM metadata, json_each(metadata.facts) GROUP BY key, type"
    types: dict[str, set[str]] = {name: set() for name in live.metadata_names}
    for name, kind in live.query(sql):
        types.get(name, set()).add(kind)  # a damaged name is found where the image is read
    return {
        name: next((held for held, within in _HELD.items() if found <= within), str)
        for name, found in types.items()
        if found
    }


def checked(metadata: Mapping[str, Any]) -> dict[str, Value]:
    """The metadata without values that are None, numbers of NumPy as plain ones.

    Raises: UsageError for a name that is no identifier, is one of the store's own or comes twice, and for a value that is
        no text, finite number of 64 bits or truth value.
    """
    facts: dict[str, Value] = {}
    for name, value in metadata.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"expected names of metadata like width or punsafe_2, got {name!r}: rename it")
        if name.lower() in RESERVED:
            raise UsageError(f"expected names of metadata that are not the store's own, got {name!r}: rename it")
        if value is not None:
            facts[name] = _checked(name, value)
    if len({name.lower() for name in facts}) < len(facts):
        raise UsageError(
            f"expected names of metadata that differ in more than case, got {', '.join(facts)}: rename one"
        )
    return facts


def scalars(row: Mapping[str, Any], besides: Collection[str] = (), *, gaps: bool = False) -> dict[str, Value]:
    """What a row of somebody's table holds that can be metadata; the rest, such as lists and NaN, is left out.

    Args:
        besides: columns that mean something else.
        gaps: leave out texts that say that nothing is known; other people's tables have them among numbers.
    """
    names = column_names(tuple(column for column in row if column not in besides))
    found = ((name, _scalar(row[column])) for column, name in names.items())
    return {name: value for name, value in found if value is not None and not (gaps and is_gap(value))}


def is_gap(value: Value) -> bool:
    """Whether it says that nothing is known."""
    return isinstance(value, str) and value.strip().lower() in GAPS


@lru_cache(64)
def column_names(columns: tuple[str, ...], taken: tuple[str, ...] = ()) -> Mapping[str, str]:
    """Names as metadata of a table's columns: `_` where an identifier has no such letter, more of them until it is free."""
    used, names = {*RESERVED, *(one.lower() for one in taken)}, {}
    for column in columns:
        name = re.sub(r"[^A-Za-z0-9_]", "_", column)
        name = f"_{name}" if not name or name[0].isdigit() else name
        while name.lower() in used:
            name += "_"
        used.add(name.lower())
        names[column] = name
    return names


def metadata_crc(record: int, facts: str) -> int:
    """CRC-32 of an image's metadata and its number."""
    return zlib.crc32(facts.encode(), zlib.crc32(str(record).encode()))


def metadata_is_sound(record: int, facts: object, crc: object) -> bool:
    """Whether the metadata is what was added with that image."""
    return isinstance(facts, str) and metadata_crc(record, facts) == crc


class _Names:
    """The names of a store, each in the spelling it came in first."""

    def __init__(self, known: Iterable[str]) -> None:
        self.all = list(known)
        self._by_lower = {name.lower(): name for name in self.all}

    def spelled(self, name: str) -> str:
        found = self._by_lower.setdefault(name.lower(), name)
        if len(self._by_lower) > len(self.all):
            self.all.append(name)
        if len(self.all) > MAX_NAMES:
            raise UsageError(
                f"expected at most {MAX_NAMES} names of metadata in an index, got one more, {name!r}: leave some out"
            )
        return found


def _count(database: sqlite3.Connection, more: int) -> None:
    """Keep how many images have metadata, which the check compares."""
    put(database, METADATA_ROWS, int(get(database, METADATA_ROWS) or 0) + more)


def _checked(name: str, value: Any) -> Value:
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, str):
        return text(plain)
    if (isinstance(plain, int) and _LEAST <= plain <= _MOST) or (isinstance(plain, float) and math.isfinite(plain)):
        return plain
    raise UsageError(
        f"metadata {name}: expected a text, a finite number of 64 bits, True or False, got {repr(value)[:60]}: "
        "leave it out or write it as a text"
    )


def _scalar(value: Any) -> Value | None:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, int):
        return value if _LEAST <= value <= _MOST else str(value)
    number = float(value) if isinstance(value, float | Decimal) else math.nan
    return number if math.isfinite(number) else None
