"""What every system is measured on: the vectors, held-out images and texts as queries, and the true neighbors of each.

A data set is a folder of .npy files, made once and then mapped by every process that measures on it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int

from vector_search.clip_like import BLOCK_ROWS, ClipLike, dimensions_for_variance, measured_cosines

K = 10
NUM_QUERIES = 1_000
IMAGES_SEED, QUERIES_SEED, TEXTS_SEED = 1, 2, 3
EXACT_ROWS = 65_536
CHECKED_ROWS = 10_000
"""Vectors that the random cosines and the principal components are measured on."""
FORMAT = 1
"""Counts up whenever the recipe or the files change, so that nothing old is taken for new."""


@dataclass(frozen=True)
class Data:
    """One data set in its folder."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        """Origin, size, dim, the measured cosines: what the report says of the data."""
        return json.loads((self.folder / "about.json").read_text(encoding="utf-8"))

    @cached_property
    def vectors(self) -> Float32[np.ndarray, "rows dim"]:
        """The unit vectors to search, mapped."""
        return np.load(self.folder / "vectors.npy", mmap_mode="r")

    @cached_property
    def queries(self) -> dict[str, Float32[np.ndarray, "queries dim"]]:
        """Unit vectors of held-out images and, where there are any, of texts."""
        return {kind: np.load(self.folder / f"{kind}.npy") for kind in self.about["queries"]}

    @cached_property
    def truth(self) -> dict[str, Int[np.ndarray, "queries k"]]:
        """The rows of the K nearest vectors of every query."""
        return {kind: np.load(self.folder / f"{kind}.truth.npy") for kind in self.about["queries"]}

    @property
    def size(self) -> int:
        """Vectors to search."""
        return int(self.about["size"])

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        return int(self.about["dim"])

    @property
    def timed(self) -> Float32[np.ndarray, "queries dim"]:
        """The queries whose time is taken: texts, or images where there are no texts."""
        return self.queries["text" if "text" in self.queries else "image"]

    def blocks(self, rows: int = EXACT_ROWS) -> Iterator[tuple[int, Float32[np.ndarray, "rows dim"]]]:
        """First row and vectors of each block, copied into memory."""
        for start in range(0, self.size, rows):
            yield start, np.array(self.vectors[start : start + rows])

    def sample(self, count: int, seed: int = 0) -> Float32[np.ndarray, "rows dim"]:
        """That many vectors drawn at random, or all."""
        rows = np.random.default_rng(seed).permutation(self.size)[:count]
        return np.ascontiguousarray(self.vectors[np.sort(rows)])


def synthetic(cache: Path, size: int, *, dim: int = 512, num_queries: int = NUM_QUERIES) -> Data:
    """CLIP-like vectors, see `clip_like`."""
    data = Data(cache / f"clip-like-{size}x{dim}-v{FORMAT}")
    if (data.folder / "about.json").exists():
        return data
    world = ClipLike(dim)
    data.folder.mkdir(parents=True, exist_ok=True)
    blocks = (world.block(number, IMAGES_SEED) for number in range(-(-size // BLOCK_ROWS)))
    _write_vectors(data.folder, size, dim, blocks)
    texts, described = world.pairs(num_queries, TEXTS_SEED)
    queries = {"image": world.images(num_queries, QUERIES_SEED, copies=False), "text": texts}
    return _finish(data, queries, described, origin="synthetic, CLIP-like (vector_search/clip_like.py)")


def from_files(cache: Path, size: int, embeddings: Path, texts: Path | None, *, num_queries: int = NUM_QUERIES) -> Data:
    """Real embeddings from .npy files, directions only; image queries are rows held out at random.

    Raises: SystemExit in one line when the files do not fit.
    """
    given = _load(embeddings)
    text_rows = None if texts is None else _load(texts, width=given.shape[1])
    stamp = [[str(path.resolve()), path.stat().st_mtime_ns] for path in (embeddings, texts) if path is not None]
    digest = hashlib.sha256(json.dumps([size, num_queries, stamp]).encode()).hexdigest()[:12]
    data = Data(cache / f"{embeddings.stem}-{digest}-v{FORMAT}")
    if (data.folder / "about.json").exists():
        return data
    if len(given) < num_queries + K:
        raise SystemExit(f"{embeddings}: expected at least {num_queries + K} rows, got {len(given)}: give more")
    data.folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(QUERIES_SEED).permutation(len(given))
    held, kept = order[:num_queries], np.sort(order[num_queries : num_queries + size])
    pieces = (_unit(given[kept[start : start + EXACT_ROWS]]) for start in range(0, len(kept), EXACT_ROWS))
    _write_vectors(data.folder, len(kept), given.shape[1], pieces)
    queries = {"image": _unit(given[np.sort(held)])}
    if text_rows is not None:
        queries["text"] = _unit(text_rows[:num_queries])
    return _finish(data, queries, None, origin=f"{embeddings.name}, texts from {texts.name if texts else 'nowhere'}")


def exact_nearest(
    data: Data, queries: Float32[np.ndarray, "queries dim"], k: int, allowed: Bool[np.ndarray, "rows"] | None = None
) -> Int[np.ndarray, "queries k"]:
    """The rows with the largest inner products, best first: every vector compared, a block at a time."""
    import faiss

    best = np.full((len(queries), 0), -np.inf, np.float32)
    rows = np.full((len(queries), 0), -1, np.int64)
    for start, block in data.blocks():
        numbers = np.arange(start, start + len(block))
        if allowed is not None:
            numbers = numbers[allowed[numbers]]
        if not len(numbers):
            continue
        compared = block[numbers - start]
        scores, found = faiss.knn(queries, compared, min(k, len(numbers)), metric=faiss.METRIC_INNER_PRODUCT)
        best, rows = np.concatenate([best, scores], 1), np.concatenate([rows, numbers[found]], 1)
        top = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, rows = np.take_along_axis(best, top, 1), np.take_along_axis(rows, top, 1)
    return rows


def _finish(
    data: Data,
    queries: dict[str, Float32[np.ndarray, "queries dim"]],
    described: Float32[np.ndarray, "queries dim"] | None,
    *,
    origin: str,
) -> Data:
    """Queries, their true neighbors, and last the file that says the data set is whole."""
    size, dim = data.vectors.shape
    data.__dict__["about"] = about = {"origin": origin, "size": size, "dim": dim, "queries": sorted(queries)}
    for kind, vectors in queries.items():
        np.save(data.folder / f"{kind}.npy", vectors)
    checked = np.array(data.vectors[:CHECKED_ROWS])
    about["cosines"] = {
        name: round(value, 3)
        for name, value in measured_cosines(checked[:2_000], queries.get("text"), described).items()
    }
    about["principal_components"] = dimensions_for_variance(checked)
    for kind, vectors in queries.items():
        np.save(data.folder / f"{kind}.truth.npy", exact_nearest(data, vectors, K))
    _write_json(data.folder / "about.json", about)
    return data


def _write_vectors(folder: Path, size: int, dim: int, blocks: Iterator[Float32[np.ndarray, "rows dim"]]) -> None:
    out = np.lib.format.open_memmap(folder / "vectors.npy", mode="w+", dtype=np.float32, shape=(size, dim))
    start = 0
    for block in blocks:
        out[start : start + len(block)] = block[: size - start]
        start += len(block)
    out.flush()


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".new")
    part.write_text(json.dumps(value), encoding="utf-8")
    os.replace(part, path)


def _load(path: Path, width: int | None = None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: expected a .npy file ({error}): give another") from None
    if array.ndim != 2 or array.dtype.kind != "f" or (width is not None and array.shape[1] != width):
        expected = "rows of floats" if width is None else f"rows of {width} floats, as the images have"
        raise SystemExit(f"{path}: expected {expected}, got {array.shape} {array.dtype}: give another file")
    return array


def _unit(vectors: np.ndarray) -> Float32[np.ndarray, "rows dim"]:
    wide = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    if not np.all(np.isfinite(norms) & (norms > 0)):
        raise SystemExit("expected finite vectors other than zero, got others: clean the file first")
    return wide / norms
