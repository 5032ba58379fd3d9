"""Ways to propose the rows that are probably nearest: look at all of them, or at the cells a query falls in (paper A.3).

An engine only proposes rows; scores come from the stored embeddings (`index.py`). Requests never change an engine.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int

from knn_diffusion.retrieval.plan import Reach
from knn_diffusion.retrieval.records import Records
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

BLOCK_ROWS = 32_768


class Allowed:
    """Which rows of a snapshot a search may find.

    Args:
        records: of the snapshot.
    """

    def __init__(self, mask: Bool[np.ndarray, "rows"], records: Records | None = None) -> None:
        self.mask, self._records = mask, records or Records.complete()

    @cached_property
    def count(self) -> int:
        """How many rows may be found."""
        return int(self.mask.sum())

    @property
    def everything(self) -> bool:
        """Whether no row is forbidden."""
        return self.count == len(self.mask)

    @cached_property
    def rows(self) -> Int[np.ndarray, "allowed"]:
        """The rows that may be found."""
        return np.flatnonzero(self.mask)

    @cached_property
    def bits(self) -> bytes:
        """One bit a record, as faiss reads them; for records beyond the snapshot's, which it may know already, there is none."""
        return np.packbits(self._records.spread(self.mask), bitorder="little").tobytes()


@runtime_checkable
class Engine(Protocol):
    """Proposes rows that are probably nearest."""

    def candidates(
        self,
        queries: Float32[np.ndarray, "queries dim"],
        count: int,
        snapshot: Snapshot,
        allowed: Allowed,
        reach: Reach,
    ) -> Int[np.ndarray, "queries found"]:
        """At least `count` allowed rows for each query, in no order, filled with -1 where fewer were found.

        Args:
            queries: unit vectors.
            count: neighbors wanted; what the reach's depth multiplies.
        """

    def looks_everywhere(self, reach: Reach) -> bool:
        """Whether so far a reach finds every allowed row if only `count` is large enough."""


class ExactEngine:
    """Compares every row with the query, in blocks; keeps them as float32."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._matrix = np.zeros((0, store.encoder.dim), np.float32)
        self._segments: tuple[int, ...] = ()
        self._lock = threading.Lock()

    def looks_everywhere(self, reach: Reach) -> bool:
        """Always."""
        return True

    def candidates(
        self,
        queries: Float32[np.ndarray, "queries dim"],
        count: int,
        snapshot: Snapshot,
        allowed: Allowed,
        reach: Reach,
    ) -> Int[np.ndarray, "queries found"]:
        """The `count` nearest allowed rows of each query."""
        return _nearest(queries, self._rows(snapshot), allowed.mask, count)

    def _rows(self, snapshot: Snapshot) -> Float32[np.ndarray, "rows dim"]:
        """The unit vectors of the snapshot's rows; those that are not known yet are read now, after a compaction all."""
        with self._lock:
            shared = min(len(self._segments), len(snapshot.segments))
            if snapshot.numbers[:shared] != self._segments[:shared]:
                self._matrix = self._matrix[:0]
            known = len(self._matrix)
            if known < snapshot.num_rows:
                new = unit_vectors(self._store, np.arange(known, snapshot.num_rows), snapshot)
                self._matrix = np.concatenate([self._matrix, new]) if len(self._matrix) else new
                self._segments = snapshot.numbers
            return self._matrix[: snapshot.num_rows]


class FewRowsEngine:
    """Compares only the allowed rows: for a filter that leaves few of many."""

    def __init__(self, store: Store, snapshot: Snapshot, allowed: Allowed) -> None:
        self._rows = allowed.rows
        self._matrix = unit_vectors(store, self._rows, snapshot)

    def looks_everywhere(self, reach: Reach) -> bool:
        """Always."""
        return True

    def candidates(
        self,
        queries: Float32[np.ndarray, "queries dim"],
        count: int,
        snapshot: Snapshot,
        allowed: Allowed,
        reach: Reach,
    ) -> Int[np.ndarray, "queries found"]:
        """The `count` nearest allowed rows of each query."""
        places = _nearest(queries, self._matrix, np.ones(len(self._rows), bool), count)
        return np.where(places < 0, -1, self._rows[places])


def unit_vectors(store: Store, rows: Int[np.ndarray, "rows"], snapshot: Snapshot) -> Float32[np.ndarray, "rows dim"]:
    """The stored vectors of these rows as float32, of length 1 again after their rounding to float16."""
    vectors = store.embeddings(rows, snapshot).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _nearest(
    queries: Float32[np.ndarray, "queries dim"],
    matrix: Float32[np.ndarray, "rows dim"],
    allowed: Bool[np.ndarray, "rows"],
    count: int,
) -> Int[np.ndarray, "queries count"]:
    """Places of the `count` allowed rows with the largest inner products, in no order; -1 where fewer are there."""
    best_rows = np.full((len(queries), count), -1, np.int64)
    best = np.full((len(queries), count), -np.inf, np.float32)
    for start in range(0, len(matrix), BLOCK_ROWS):
        block = matrix[start : start + BLOCK_ROWS]
        scores = queries @ block.T
        scores[:, ~allowed[start : start + len(block)]] = -np.inf
        scores = np.concatenate([best, scores], 1)
        numbers = np.arange(start, start + len(block))
        rows = np.concatenate([best_rows, np.broadcast_to(numbers, (len(queries), len(block)))], 1)
        top = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        best, best_rows = np.take_along_axis(scores, top, 1), np.take_along_axis(rows, top, 1)
    return np.where(np.isneginf(best), -1, best_rows)
