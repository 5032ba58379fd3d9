"""What a store knows of an image beside its vector: a stable id and its provenance, with digests of both."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from knn_diffusion.errors import UsageError
from knn_diffusion.retrieval.database import text

ID_LENGTH = 16

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

    An empty id asks the store to take the first 16 digits of the content digest.
    """

    source: str
    content: str
    key: str = ""
    id: str = ""

    def facts(self, added_at: float) -> Facts:
        """As the database holds it."""
        return self.id, text(self.source), text(self.key), bytes.fromhex(self.content), added_at


def items_digest(items: Iterable[Facts]) -> str:
    """SHA-256 over id, source, key, content and time of a segment's items."""
    total = hashlib.sha256()
    for facts in items:
        total.update(_line(facts))
    return total.hexdigest()


def item_crc(record: int, facts: Facts) -> int:
    """CRC-32 of one item and its number, to be verified whenever it is read."""
    return zlib.crc32(_line(facts), zlib.crc32(str(record).encode()))


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
    added = np.zeros(len(items), bool)
    chosen: dict[str, Item] = {}
    contents: set[str] = set()
    for place, item in enumerate(items):
        if item.content in contents or _taken(database, "content", bytes.fromhex(item.content)):
            continue
        for id_ in [text(item.id)] if item.id else [item.content[:ID_LENGTH], item.content]:
            if id_ not in chosen and not _taken(database, "id", id_):
                break
        else:
            raise UsageError(f"id {item.id!r} is taken by other content: choose another id or remove that image first")
        contents.add(item.content)
        chosen[id_] = replace(item, id=id_)
        added[place] = True
    return added, list(chosen.values())


def _taken(database: sqlite3.Connection, column: str, value: str | bytes) -> bool:
    sql = f"SELECT 1 FROM items WHERE deleted_at IS NULL AND {column} = ?"
    return database.execute(sql, (value,)).fetchone() is not None


def _line(facts: Facts) -> bytes:
    id_, source, key, content, added_at = facts
    digits = content.hex() if isinstance(content, bytes) else None
    return json.dumps([id_, source, key, digits, added_at], default=repr).encode()
