"""What a store knows of an image beside its vector: a stable id and its provenance, with digests of both."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from knn_diffusion.errors import UsageError
from knn_diffusion.retrieval.database import pieces, text

ID_LENGTH = 16
_JSON = json.JSONEncoder(default=repr)

Facts = tuple[str, str, str, bytes, float]
"""Id, source, key, content digest and time of adding (seconds since 1970), as the database holds them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderIdentity:
    """Which joint encoder made the vectors: its name, the fingerprint of its weights and preprocessing, and its width."""

    name: str
    fingerprint: str
    dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image: a stable id, its provenance (file or shard, key inside it), and the SHA-256 of its content in hexadecimal.

    An empty id asks the store to take the first 16 digits of the content digest. The metadata is whatever else is known, by
    names that a condition can use: texts, numbers and truth values; None says that nothing is known.
    """

    source: str
    content: str
    key: str = ""
    id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def facts(self, added_at: float) -> Facts:
        """As the database holds it."""
        return self.id, text(self.source), text(self.key), bytes.fromhex(self.content), added_at


def item_line(facts: Sequence[Any]) -> bytes:
    """What digests of an item are taken over: its facts, which may be damaged ones of any type."""
    id_, source, key, content, added_at = facts
    digits = content.hex() if isinstance(content, bytes) else None
    return _JSON.encode([id_, source, key, digits, added_at]).encode()


def items_digest(lines: Iterable[bytes]) -> str:
    """SHA-256 over the lines of a segment's items."""
    total = hashlib.sha256()
    for one in lines:
        total.update(one)
    return total.hexdigest()


def item_crc(record: int, line: bytes) -> int:
    """CRC-32 of one item's line and its number, to be verified whenever it is read."""
    return zlib.crc32(line, zlib.crc32(str(record).encode()))


def preview_crc(record: int, picture: bytes) -> int:
    """CRC-32 of an encoded picture and the number of its image."""
    return zlib.crc32(picture, zlib.crc32(str(record).encode()))


def preview_is_sound(record: int, picture: object, crc: int) -> bool:
    """Whether a picture is the one that was added with that image; format 1 left the number out."""
    return isinstance(picture, bytes) and crc in (preview_crc(record, picture), zlib.crc32(picture))


def choose(database: sqlite3.Connection, items: Sequence[Item]) -> tuple[Bool[np.ndarray, "items"], list[Item]]:
    """Which items are new to the database, and those with their ids.

    Raises: UsageError for an id taken by other content.
    """
    contents = _taken(database, "content", {bytes.fromhex(item.content) for item in items})
    ids = _taken(database, "id", {text(item.id) or item.content[:ID_LENGTH] for item in items})
    added = np.zeros(len(items), bool)
    chosen: list[Item] = []
    for place, item in enumerate(items):
        content = bytes.fromhex(item.content)
        if content in contents:
            continue
        id_ = text(item.id) or item.content[:ID_LENGTH]
        if id_ in ids and not item.id:  # by other content of the same beginning
            id_ = item.content
            ids |= _taken(database, "id", {id_})
        if id_ in ids:
            raise UsageError(f"id {item.id!r} is taken by other content: choose another id or remove that image first")
        contents.add(content)
        ids.add(id_)
        chosen.append(replace(item, id=id_))
        added[place] = True
    return added, chosen


def _taken(database: sqlite3.Connection, column: str, values: Set[Any]) -> set[Any]:
    """Those of the values that an image has which is not removed."""
    found = set()
    for piece in pieces(list(values)):
        sql = f"SELECT {column} FROM items WHERE deleted_at IS NULL AND {column} IN ({','.join('?' * len(piece))})"
        found |= {value for (value,) in database.execute(sql, piece)}
    return found
