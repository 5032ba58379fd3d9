"""Embeddings as other tools leave them on a disk, and stores to compare with: for tests of import and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from knn_diffusion.retrieval.interchange import ImportReport, find_vectors, import_vectors
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

DIM = 8
MADE_BY = EncoderIdentity(name="toy", fingerprint="f" * 64, dim=DIM)


class Encoder:
    """Vectors that need no pictures."""

    def __init__(self, name: str = "toy", fingerprint: str = "f" * 64, dim: int = DIM) -> None:
        self.name, self.fingerprint, self.dim = name, fingerprint, dim

    def encode_images(self, images: Any) -> np.ndarray:
        return np.ones((len(images), self.dim), np.float32) / self.dim**0.5

    def encode_texts(self, texts: Any) -> np.ndarray:
        return self.encode_images(texts)


def vectors(count: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def facts(store: Store) -> list[tuple[str, str, str, str, bytes]]:
    """Everything of every image that travels."""
    rows = store.snapshot().live_rows
    found = zip(store.items(rows), store.embeddings(rows), strict=True)
    return [(item.id, item.source, item.key, item.content, vector.tobytes()) for item, vector in found]


def filled(count: int = 30, *, removed: tuple[int, ...] = (), source: str = "photos/{}.png") -> Store:
    """A store in memory, in two segments."""
    store = Store.create(None, MADE_BY)
    items = [
        Item(id=f"id {n}", source=source.format(n), key=f"k{n}", content=f"{n:064x}") for n in range(count)
    ]  # fmt: skip
    rows = vectors(count)
    store.append(items[: count // 3], rows[: count // 3])
    store.append(items[count // 3 :], rows[count // 3 :])
    store.remove([f"id {n}" for n in removed])
    return store


def imported(source: Any, **options: Any) -> tuple[Store, ImportReport]:
    store = Store.create(None, MADE_BY)
    return store, import_vectors(store, find_vectors(source, **options))


def write_clip_folder(folder: Path) -> Path:
    """As clip-retrieval writes it: two files of embeddings and metadata, texts, and an index file."""
    from pyarrow import parquet, table

    rows = vectors(30).astype(np.float16)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, some in enumerate((slice(0, 10), slice(10, 30))):
        count = len(rows[some])
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", rows[some])
        np.save(folder / "text_emb" / f"text_emb_{number}.npy", -rows[some])
        numbers = range(some.start, some.stop)
        columns = {
            "image_path": [f"0000{number}{n:04}" for n in numbers],
            "caption": ["a cat"] * count,
            "key": [f"{n:09}" for n in numbers],
            "url": [f"https://example.org/{n}.jpg" if n % 2 else None for n in numbers],
            "id": [1] * count,  # other people's ids need not be unique
            "exif": [{"nested": n} for n in numbers],
        }
        parquet.write_table(table(columns), folder / "metadata" / f"metadata_{number}.parquet", row_group_size=7)
    (folder / "image.index").write_bytes(b"not looked at")
    return folder


def stopping_after(number: int) -> Any:
    calls: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        calls.append((what, done, total))
        if len(calls) == number:
            raise KeyboardInterrupt

    return progress
