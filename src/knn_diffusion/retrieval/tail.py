"""The newest rows of an index in cells, compared one by one until they are put into cells."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int64

from knn_diffusion.retrieval.cells import faiss_module, threads_for
from knn_diffusion.retrieval.engines import Allowed
from knn_diffusion.retrieval.segments import CompactedError, Snapshot
from knn_diffusion.retrieval.store import Store

_SPARE = 8
"""Proposed beyond the rows wanted: stored vectors are of length 1 up to rounding only."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Stored vectors in memory, never changed: other searches may be reading."""

    index: Any
    records: Int64[np.ndarray, "held"]
    end: int
    """The first record that is not here."""


class Tail:
    """Compares every row from that of `first_record` on with the query, as stored: half precision halves what is read.

    Faiss does it as it searches the cells; the threads of a matrix product and those of faiss would wait for each other.
    """

    def __init__(self, store: Store, first_record: int) -> None:
        faiss, dim = faiss_module(), store.encoder.dim
        empty = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self._store, self._lock, self._first_record = store, threading.Lock(), first_record
        self._held = _Held(empty, np.zeros(0, np.int64), first_record)

    def candidates(
        self, queries: Float32[np.ndarray, "queries dim"], count: int, snapshot: Snapshot, allowed: Allowed
    ) -> Int[np.ndarray, "queries found"]:
        """The nearest allowed rows of each query, at least `count`; -1 where fewer are there.

        Raises: CompactedError when the snapshot shows rows that were purged before they came here.
        """
        faiss, held = faiss_module(), self._up_to(snapshot)
        rows = snapshot.records.rows_of(held.records)
        rows[rows >= snapshot.num_rows] = -1
        if np.count_nonzero(rows >= 0) < snapshot.num_rows - snapshot.records.row_from(self._first_record):
            raise CompactedError(
                "some of the newest images of an older snapshot were purged before they came here: take a new one and ask again"
            )
        rows[rows >= 0] = np.where(allowed.mask[rows[rows >= 0]], rows[rows >= 0], -1)
        parameters = None
        if rows.min(initial=0) < 0:
            bits = np.packbits(rows >= 0, bitorder="little")
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        with threads_for(len(queries)):
            places = held.index.search(queries, min(count + _SPARE, len(rows)), params=parameters)[1]
        return np.where(places < 0, -1, rows[places])

    def _up_to(self, snapshot: Snapshot) -> _Held:
        """What is held, with the snapshot's rows that were not known before."""
        with self._lock:
            held, first = self._held, snapshot.records.row_from(self._held.end)
            if first < snapshot.num_rows:
                rows = np.arange(first, snapshot.num_rows)
                index = faiss_module().clone_index(held.index)
                index.add_sa_codes(self._store.embeddings(rows, snapshot).view(np.uint8))
                records = np.concatenate([held.records, snapshot.records.of_rows(rows)])
                self._held = held = _Held(index, records, snapshot.num_records)
            return held
