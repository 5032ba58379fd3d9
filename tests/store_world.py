"""Made-up images for tests of the store: everything about image n follows from n."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

DIM = 6
TOY = EncoderIdentity(name="toy", fingerprint="f" * 16, dim=DIM)


def content(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def id_of(number: int) -> str:
    return content(number)[:16]


def batch(numbers: Iterable[int]) -> tuple[list[Item], np.ndarray, np.ndarray, list[bytes | None]]:
    numbers = list(numbers)
    items = [Item(source=f"photos/{n}.png", key=f"{n}.png", content=content(n)) for n in numbers]
    vectors = np.stack([np.random.default_rng(n).standard_normal(DIM) for n in numbers]).astype(np.float32)
    thumbnails = np.stack([np.full(192, n % 256, np.uint8) for n in numbers])
    return items, vectors, thumbnails, [f"picture {n}".encode() for n in numbers]


def filled(folder: Path | None, *ranges: range) -> Store:
    store = Store.create(folder, TOY)
    for numbers in ranges:
        store.append(*batch(numbers))
    return store


def everything(store: Store, snapshot: Snapshot | None = None) -> dict[str, tuple[str, bytes, bytes, bytes | None]]:
    """Every image by its id: source, vector, 8×8 picture and preview."""
    now = snapshot or store.snapshot()
    rows = now.live_rows
    vectors, (pictures, _) = store.embeddings(rows, now), store.thumbnails(rows, now)
    return {
        item.id: (item.source, vectors[n].tobytes(), pictures[n].tobytes(), store.preview(int(rows[n]), now))
        for n, item in enumerate(store.items(rows, now))
    }
