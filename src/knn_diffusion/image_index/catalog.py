"""Which images an index holds: their ids, where they came from, what else is known of them, how they look."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt64
from PIL import Image

from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.image_index.exclusion import require_list
from knn_diffusion.image_index.settings import preview_side
from knn_diffusion.retrieval.metadata import Value
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

KEYS_AT_ONCE = 1_000_000


def ids(store: Store) -> list[str]:
    """The id of every image, in the order they were added."""
    return store.consistently(lambda now: [facts[0] for facts in store.facts(now.live_rows, now)])


def content_keys(store: Store, snapshot: Snapshot) -> UInt64[np.ndarray, "items"]:
    """The first eight bytes of the content digest of every image, in the order they were added; 0 of those purged since."""
    records = snapshot.records.of_rows(snapshot.live_rows)
    keys = np.zeros(len(records), np.uint64)
    for start in range(0, len(records), KEYS_AT_ONCE):
        some = records[start : start + KEYS_AT_ONCE]
        sql = "SELECT row, CAST(content AS BLOB) FROM items WHERE row BETWEEN ? AND ?"
        found = store.live.query(sql, (int(some[0]), int(some[-1])))
        there = np.fromiter((row for row, _ in found), np.int64, len(found))
        contents = np.fromiter((int.from_bytes(content[:8].ljust(8)) for _, content in found), np.uint64, len(found))
        places = np.searchsorted(some, there)
        fits = some[places.clip(max=len(some) - 1)] == there
        keys[start + places[fits]] = contents[fits]
    return keys


def sources(store: Store, wanted: Sequence[str]) -> list[str]:
    """Where the images of these ids came from. Raises: UsageError for an unknown id."""
    found = store.consistently(lambda now: store.items(_rows(store, wanted, now), now))
    return [item.source for item in found]


def metadata(store: Store, wanted: Sequence[str]) -> list[dict[str, Value]]:
    """What is known of the images of these ids, by name. Raises: UsageError for an unknown id."""
    return store.consistently(lambda now: store.metadata(_rows(store, wanted, now), now))


def preview(store: Store, wanted: str) -> Image.Image | None:
    """The small picture of an image in RGB or RGBA, None when it has none.

    Raises: UsageError for an unknown id; StoreError when what is stored is no preview of this index.
    """
    content = store.consistently(lambda now: store.preview(int(_rows(store, [wanted], now)[0]), now))
    return _opened_preview(content, preview_side(store), f"{store.name}, {wanted}") if content is not None else None


def _opened_preview(content: bytes, side: int, name: str) -> Image.Image:
    """Believes nothing: an index may come from anybody."""
    try:
        with Image.open(io.BytesIO(content), formats=("WEBP",)) as opened:  # noqa: TID251
            if max(opened.width, opened.height) <= side:
                return opened.convert("RGBA" if opened.mode == "RGBA" else "RGB")
            problem = f"is {opened.width} × {opened.height}"
    except Exception as error:  # decoders raise anything at all on damaged files
        problem = f"cannot be decoded ({' '.join(str(error).split())[:100]})"
    raise StoreError(
        f"{name}: expected a preview in WebP of at most {side} pixels, it {problem}: restore a copy or build the index again"
    )


def digest(store: Store, snapshot: Snapshot, also: object) -> str:
    """A digest of the images, their order, and something that counts beside them."""
    parts = snapshot.digest(len(snapshot.segments)), np.packbits(snapshot.alive).tobytes().hex(), repr(also)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _rows(store: Store, wanted: Sequence[str], snapshot: Snapshot) -> Int[np.ndarray, "ids"]:
    require_list(wanted)
    rows = store.rows_of(wanted, snapshot)
    if unknown := [one for one, row in zip(wanted, rows, strict=True) if row < 0]:
        raise UsageError(f"expected the id of an image in {store.name}, got {unknown[0]!r}: search to see its ids")
    return rows
