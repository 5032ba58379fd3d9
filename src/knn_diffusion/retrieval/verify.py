"""Everything that can be wrong with a store, looked for in every file and every row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from knn_diffusion.errors import StoreError
from knn_diffusion.retrieval.identity import DATABASE
from knn_diffusion.retrieval.items import Facts, item_line, items_digest, preview_is_sound
from knn_diffusion.retrieval.manifest import METADATA_ROWS
from knn_diffusion.retrieval.metadata import metadata_is_sound
from knn_diffusion.retrieval.segments import Segment, Snapshot

if TYPE_CHECKING:
    from knn_diffusion.retrieval.store import Store

RECORDS_READ, PREVIEWS_READ = 10_000, 1_000


def problems(store: Store) -> list[str]:
    """What is wrong, each in a few words; empty for a sound store. A compaction meanwhile makes it look again."""
    while True:
        try:
            before = store.snapshot()
            found = list(_problems(store, before))
            if not found or store.snapshot().generation == before.generation:
                return found
        except StoreError as error:
            return [str(error)]


def item_problems(store: Store, snapshot: Snapshot, segment: Segment) -> Iterator[str]:
    """What is wrong with the items of a segment."""
    if items_digest(map(item_line, _items_of(store, snapshot, segment))) != segment.items_sha256:
        yield f"{DATABASE}: the items of segment {segment.number} are not those that were added"


def _problems(store: Store, snapshot: Snapshot) -> Iterator[str]:
    broken = [f"{DATABASE}: {found}" for (found,) in store.live.query("PRAGMA integrity_check") if found != "ok"]
    if broken:
        yield broken[0]
        return
    for segment in snapshot.segments:
        for array in segment.arrays().values():
            yield from array.problems()
        yield from item_problems(store, snapshot, segment)
    end = int(snapshot.records.of_rows(np.array([snapshot.num_rows]))[0])
    total = store.live.query("SELECT count(*) FROM items WHERE row < ?", (end,))[0][0]
    if total != snapshot.num_rows:
        yield f"{DATABASE}: expected {snapshot.num_rows} rows, found {total}"
    yield from _preview_problems(store)
    yield from _metadata_problems(store)


def _preview_problems(store: Store) -> Iterator[str]:
    last = -1
    counted, total = store.live.query(
        "SELECT (SELECT value FROM settings WHERE name = 'previews'), (SELECT count(*) FROM previews)"
    )[0]
    if counted is not None and int(counted) != total:
        yield f"{DATABASE}: expected {counted} previews, found {total}"
    while found := store.live.query(
        "SELECT row, picture, crc32 FROM previews WHERE row > ? ORDER BY row LIMIT ?", (last, PREVIEWS_READ)
    ):
        for row, picture, crc in found:
            if not preview_is_sound(row, picture, crc):
                yield f"the preview of row {row} is damaged"
        last = found[-1][0]


def _metadata_problems(store: Store) -> Iterator[str]:
    last, counted = -1, int(store.setting(METADATA_ROWS) or 0)
    if not store.live.query("SELECT name FROM sqlite_master WHERE name = 'metadata'"):
        yield from [f"{DATABASE}: expected metadata of {counted} images, found none"] if counted else []
        return
    total = store.live.query("SELECT count(*) FROM metadata")[0][0]
    if counted != total:
        yield f"{DATABASE}: expected metadata of {counted} images, found {total}"
    while found := store.live.query(
        "SELECT row, facts, crc32 FROM metadata WHERE row > ? ORDER BY row LIMIT ?", (last, RECORDS_READ)
    ):
        yield from (f"the metadata of row {one[0]} is damaged" for one in found if not metadata_is_sound(*one))
        last = found[-1][0]


def _items_of(store: Store, snapshot: Snapshot, segment: Segment) -> Iterator[Facts]:
    ends = np.array([segment.first_row, segment.first_row + segment.num_rows - 1])
    first, last = snapshot.records.of_rows(ends).tolist()
    sql = "SELECT id, source, key, content, added_at FROM items WHERE row >= ? AND row <= ? ORDER BY row"
    for start in range(first, last + 1, RECORDS_READ):
        yield from store.live.query(sql, (start, min(start + RECORDS_READ - 1, last)))
