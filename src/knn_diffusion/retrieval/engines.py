"""Two ways to find candidates for the nearest rows: look at all of them, or at the cells a query falls in (paper A.3).

An engine only proposes rows; scores come from the stored embeddings (`index.py`). Requests never change an engine.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int

from knn_diffusion.checkpoint import atomic_write_bytes, file_digest, write_json
from knn_diffusion.config import config, require
from knn_diffusion.errors import KnnDiffusionError
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

BLOCK_ROWS = 65_536
POINTS_PER_CENTROID = 64
"""Training vectors for each centroid of the cells; faiss warns below 39 and samples above 256."""


@config
class IndexConfig:
    """How an index searches.

    exact_below   up to this many images every one is compared with the query; beyond, faiss looks into cells
    num_probes    cells looked into for each query; the paper: the image's own and 19 others
    cells         number of cells; None: 4·sqrt(images), a power of two, at least 16
    code_bits     bits of each sub-quantizer of the codes, 4 or 8; with 8, one byte for two dimensions as in the paper
    depth         candidates fetched for each one wanted, and ranked again by their stored embeddings
    """

    exact_below: int = 100_000
    num_probes: int = 20
    cells: int | None = None
    code_bits: int = 8
    depth: int = 8

    def __post_init__(self) -> None:
        require(self.exact_below >= 0, "exact_below", self.exact_below, "at least 0")
        require(self.num_probes >= 1, "num_probes", self.num_probes, "at least 1")
        require(self.cells is None or self.cells >= 1, "cells", self.cells, "at least 1 or None")
        require(self.code_bits in (4, 8), "code_bits", self.code_bits, "4 or 8")
        require(self.depth >= 1, "depth", self.depth, "at least 1")

    def num_cells(self, count: int) -> int:
        """Cells for `count` images."""
        return self.cells or 2 ** max(4, round(np.log2(4 * count**0.5)))


@runtime_checkable
class Engine(Protocol):
    """Proposes rows that are probably nearest."""

    def candidates(
        self,
        queries: Float32[np.ndarray, "queries dim"],
        count: int,
        snapshot: Snapshot,
        allowed: Bool[np.ndarray, "rows"],
        effort: int,
    ) -> Int[np.ndarray, "queries found"]:
        """At least `count` allowed rows for each query, in no order, filled with -1 where fewer were found.

        Args:
            effort: 1 for a usual search; each doubling looks twice as far, until everything is looked at.
        """

    def looks_everywhere(self, effort: int) -> bool:
        """Whether at this effort every allowed row is found if only `count` is large enough."""


class ExactEngine:
    """Compares every row from `first_row` on with the query, in blocks; keeps them as float32."""

    def __init__(self, store: Store, first_row: int = 0) -> None:
        self._store, self._first = store, first_row
        self._matrix = np.zeros((0, store.encoder.dim), np.float32)
        self._lock = threading.Lock()

    def looks_everywhere(self, effort: int) -> bool:
        """Always."""
        return True

    def candidates(
        self,
        queries: Float32[np.ndarray, "queries dim"],
        count: int,
        snapshot: Snapshot,
        allowed: Bool[np.ndarray, "rows"],
        effort: int = 1,
    ) -> Int[np.ndarray, "queries found"]:
        """The `count` nearest allowed rows of each query."""
        matrix = self._rows(snapshot)
        best_rows = np.full((len(queries), count), -1, np.int64)
        best = np.full((len(queries), count), -np.inf, np.float32)
        for start in range(0, len(matrix), BLOCK_ROWS):
            block = matrix[start : start + BLOCK_ROWS]
            first = self._first + start
            scores = queries @ block.T
            scores[:, ~allowed[first : first + len(block)]] = -np.inf
            scores = np.concatenate([best, scores], 1)
            numbers = np.arange(first, first + len(block))
            rows = np.concatenate([best_rows, np.broadcast_to(numbers, (len(queries), len(block)))], 1)
            top = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            best, best_rows = np.take_along_axis(scores, top, 1), np.take_along_axis(rows, top, 1)
        return np.where(np.isneginf(best), -1, best_rows)

    def _rows(self, snapshot: Snapshot) -> Float32[np.ndarray, "rows dim"]:
        """The unit vectors of the snapshot's rows; those appended since the last search are read now."""
        with self._lock:
            known = self._first + len(self._matrix)
            if known < snapshot.num_rows:
                new = self._store.embeddings(np.arange(known, snapshot.num_rows), snapshot).astype(np.float32)
                new /= np.linalg.norm(new, axis=1, keepdims=True)
                self._matrix = np.concatenate([self._matrix, new]) if len(self._matrix) else new
            return self._matrix[: max(0, snapshot.num_rows - self._first)]


class CellEngine:
    """Faiss: OPQ + inverted file + PQ, the paper's index; rows added after it was built are compared one by one.

    The file in the store's `cache/` folder is made again when it is missing, damaged, or of another store or configuration.
    """

    def __init__(self, store: Store, settings: IndexConfig) -> None:
        self._config = settings
        snapshot = store.snapshot()
        self._index, self.num_segments = _cached(store, snapshot, settings) or _build(store, snapshot, settings)
        self.num_rows = sum(segment.num_rows for segment in snapshot.segments[: self.num_segments])
        self._added = ExactEngine(store, self.num_rows)

    def looks_everywhere(self, effort: int) -> bool:
        """When the probes reach all cells."""
        return bool(self._config.num_probes * effort >= _cells(self._index).nlist)

    def outgrown(self, snapshot: Snapshot) -> bool:
        """Whether so many rows were added that comparing them one by one costs more than building again."""
        return _outgrown(snapshot, self.num_rows, self._config)

    def candidates(
        self,
        queries: Float32[np.ndarray, "queries dim"],
        count: int,
        snapshot: Snapshot,
        allowed: Bool[np.ndarray, "rows"],
        effort: int = 1,
    ) -> Int[np.ndarray, "queries found"]:
        """See Engine; the faiss index itself is never changed by a request."""
        faiss = _faiss()
        inside = allowed[: self.num_rows]
        probes = min(self._config.num_probes * effort, _cells(self._index).nlist)
        options: dict[str, Any] = {"nprobe": probes}
        if len(inside) < self.num_rows or not inside.all():
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(inside, bitorder="little"))
        parameters = faiss.SearchParametersPreTransform(index_params=faiss.SearchParametersIVF(**options))
        depth = min(max(count * self._config.depth, 64), max(self.num_rows, 1))
        _, found = self._index.search(np.ascontiguousarray(queries), depth, params=parameters)
        added = self._added.candidates(
            queries, min(count, max(snapshot.num_rows - self.num_rows, 1)), snapshot, allowed
        )
        return np.concatenate([found, added], 1)


def _build(store: Store, snapshot: Snapshot, settings: IndexConfig) -> tuple[Any, int]:
    """Train and fill a new faiss index, and keep it beside the store where that can be written."""
    faiss, dim = _faiss(), store.encoder.dim
    live, parts = snapshot.live_rows, _sub_quantizers(dim)
    cells = min(settings.num_cells(len(live)), len(live))
    rotation = faiss.OPQMatrix(dim, parts)
    codes = faiss.ProductQuantizer(dim, parts, settings.code_bits)
    codes.cp.min_points_per_centroid = 1
    rotation.pq = codes
    cell_index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(dim), dim, cells, parts, settings.code_bits, faiss.METRIC_INNER_PRODUCT
    )
    cell_index.cp.min_points_per_centroid = cell_index.pq.cp.min_points_per_centroid = 1
    index = faiss.IndexPreTransform(rotation, cell_index)
    wanted = max(POINTS_PER_CENTROID * max(cells, 2**settings.code_bits), BLOCK_ROWS)
    draw = np.sort(np.random.default_rng(0).permutation(live)[:wanted])
    # With fewer vectors than centroids faiss refuses, with fewer than dimensions its OPQ writes beyond its memory (1.15.1).
    draw = np.resize(draw, max(len(draw), 2**settings.code_bits, 2 * dim))
    index.train(store.embeddings(draw, snapshot).astype(np.float32))
    rotation.pq = None
    for start in range(0, snapshot.num_rows, BLOCK_ROWS):
        rows = np.arange(start, min(start + BLOCK_ROWS, snapshot.num_rows))
        index.add(store.embeddings(rows, snapshot).astype(np.float32))
    if store.folder is not None and not store.read_only:
        _keep(index, store.folder / "cache", _facts(snapshot, len(snapshot.segments), settings))
    return index, len(snapshot.segments)


def _sub_quantizers(dim: int) -> int:
    """Bytes of a code: one for two dimensions (the paper: 256 for 512), or the next fewer that divide the width."""
    return max(parts for parts in range(1, max(dim // 2, 1) + 1) if dim % parts == 0)


def _faiss() -> Any:
    """Faiss, imported when first needed: an index below `exact_below` never does."""
    import faiss

    return faiss


def _cells(index: Any) -> Any:
    return _faiss().extract_index_ivf(index)


def _outgrown(snapshot: Snapshot, num_rows: int, settings: IndexConfig) -> bool:
    return bool(snapshot.num_rows - num_rows > max(settings.exact_below, num_rows // 4))


def _facts(snapshot: Snapshot, num_segments: int, settings: IndexConfig) -> dict[str, Any]:
    covered = sum(segment.num_rows for segment in snapshot.segments[:num_segments])
    shape = [settings.code_bits, settings.cells]
    return {"num_segments": num_segments, "num_rows": covered, "shape": shape, "store": snapshot.digest(num_segments)}


def _keep(index: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Write the index and what it was made from. A disk that is full costs only the time to build it again."""
    try:
        atomic_write_bytes(folder / "search.faiss", _faiss().serialize_index(index).tobytes())
        write_json(folder / "search.json", facts | {"sha256": file_digest(folder / "search.faiss")})
    except (KnnDiffusionError, OSError):
        (folder / "search.json").unlink(missing_ok=True)


def _cached(store: Store, snapshot: Snapshot, settings: IndexConfig) -> tuple[Any, int] | None:
    """The index kept beside the store, None unless it is whole and made from the store's first segments."""
    if store.folder is None or cache_problem(store.folder) is not None:
        return None
    facts = read_facts(store.folder)
    if facts is None or facts.pop("sha256") is None or facts["num_segments"] > len(snapshot.segments):
        return None
    if facts != _facts(snapshot, facts["num_segments"], settings):
        return None
    if _outgrown(snapshot, facts["num_rows"], settings):
        return None
    data = np.frombuffer((store.folder / "cache" / "search.faiss").read_bytes(), np.uint8)
    return _faiss().deserialize_index(data), facts["num_segments"]


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What the index kept in a store's folder was made from, None when there is none or it cannot be read."""
    try:
        facts = json.loads((folder / "cache" / "search.json").read_text(encoding="utf-8"))
        return {name: facts[name] for name in ("num_segments", "num_rows", "shape", "store", "sha256")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cache_problem(folder: Path) -> str | None:
    """What is wrong with the index kept in a store's folder, None when it is whole or not there."""
    kept = folder / "cache" / "search.faiss"
    if not kept.is_file() and not (folder / "cache" / "search.json").is_file():
        return None
    facts = read_facts(folder)
    if facts is not None and kept.is_file() and file_digest(kept) == facts["sha256"]:
        return None
    return "cache/search.faiss is damaged or incomplete: delete the cache folder, it is made again"
