"""Search in cells, with codes: built in parts that survive an interruption, and growing while it serves.

Rows lie in parts, each a faiss index of the same cells and codes: one for what was there when the index was built, and
smaller ones for what came later. The newest rows of all are compared one by one until a thread in the background has put
them into a part; no search waits for it, and parts are replaced, never changed.

Parts know rows by their records, which a compaction leaves as they are: a search tells them which records it may find
and learns from the snapshot in which rows they lie. What was purged is taken out when it is much, in the background too.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from knn_diffusion.errors import KnnDiffusionError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.cells import (
    add_rows,
    drop_others,
    empty_like,
    list_sizes,
    merged,
    num_cells,
    search_cells,
    take_rows,
    train_index,
)
from knn_diffusion.retrieval.engines import Allowed, unit_vectors
from knn_diffusion.retrieval.kept import FACTS, RETRAINING, KeptIndex, Part, Shape
from knn_diffusion.retrieval.plan import Plan, Reach, training_points
from knn_diffusion.retrieval.segments import CompactedError, Snapshot
from knn_diffusion.retrieval.store import Store
from knn_diffusion.retrieval.tail import Tail

PART_ROWS = 2**20
"""Rows after which a build is kept on the disk."""
TAIL_ROWS = 4096
"""So many rows are compared one by one before they are put into cells."""
KEPT_ROWS = 65_536
"""A part of later rows is worth a file of its own from so many on."""
SWEPT_SHARE = 0.25
"""Purged images are taken out of the cells when they are this many, for each image that is there."""
RESUMED_SHARE = 0.1
"""Training that was interrupted begins anew when a larger share of the images came later."""
ADD_ROWS = 16_384
NICER = 5
"""How much lower the priority of the thread in the background is: a third of the time where all are busy."""
LEAST_DEPTH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A part in memory: the records from where the part before it ends up to `num_records`."""

    index: Any
    num_records: int


class CellEngine:
    """Cells and codes over a store's rows; what is kept in the store's `cache/` folder is used again.

    Args:
        anew: train cells and codes on the images there are now, and put them in the place of those in `cache/` when all
            images lie in them. One that was interrupted goes on, unless many images came since.

    Raises: KnnDiffusionError when those could not be kept.
    """

    def __init__(self, store: Store, plan: Plan, *, anew: bool = False, progress: Progress | None = None) -> None:
        snapshot = store.snapshot()
        self._store, self._lock = store, threading.Lock()
        self._worker: threading.Thread | None = None
        self._kept = KeptIndex.open(store, shape_of(store, plan), RETRAINING if anew else FACTS)
        if anew and self._kept.trained_records < (1 - RESUMED_SHARE) * snapshot.num_records:
            self._kept.forget()
        self._trained = self._kept.load_trained()
        if self._trained is None:
            self._trained = _train(store, snapshot, plan, progress)
            self._kept.keep_trained(self._trained, snapshot)
        self.cells = num_cells(self._trained)
        self._parts = _as_one(self._kept.load_parts())
        first = self.first_later_row(snapshot)
        if not self._parts or snapshot.num_rows - first > (0 if anew else max(first // 4, KEPT_ROWS)):
            self._build(snapshot, progress)
        if anew:
            self._kept.publish(self.num_records)
        self._tail = Tail(store, self.num_records)
        # Made, or swept by another process, without what was purged by now: snapshots from before would miss it.
        self._generation = store.snapshot().generation

    @property
    def trained(self) -> tuple[Any, int]:
        """Cells and codes without images, and the first record that was not there when they were trained."""
        return self._trained, self._kept.trained_records

    def imbalance(self) -> float:
        """Times as many images that a query meets in its cells as if all were equally full."""
        with self._lock:
            parts = self._parts
        sizes = np.sum([list_sizes(part.index) for part in parts], 0).astype(np.float64)
        return float(len(sizes) * np.square(sizes).sum() / max(sizes.sum(), 1) ** 2)

    @property
    def num_records(self) -> int:
        """Records below this one lie in cells; later ones are compared one by one."""
        return self._parts[-1].num_records if self._parts else 0

    def first_later_row(self, snapshot: Snapshot) -> int:
        """The first row of the snapshot that does not lie in cells."""
        return min(snapshot.records.row_from(self.num_records), snapshot.num_rows)

    def looks_everywhere(self, reach: Reach) -> bool:
        """When the probes reach all cells."""
        return reach.probes >= self.cells

    def superseded(self, plan: Callable[[], Plan]) -> bool:
        """Whether another process has put new cells, of this plan, in the place of these; told once."""
        return self._kept.changed() and self._kept.superseded(shape_of(self._store, plan()))

    def candidates(
        self,
        queries: Float32[np.ndarray, "queries dim"],
        count: int,
        snapshot: Snapshot,
        allowed: Allowed,
        reach: Reach,
    ) -> Int[np.ndarray, "queries found"]:
        """See Engine; the faiss indexes themselves are never changed by a request."""
        with self._lock:
            parts, tail = self._parts, self._tail
            if snapshot.generation < self._generation:
                raise CompactedError(
                    "the cells no longer hold what an older snapshot shows: take a new one and ask again"
                )
        end, held = parts[-1].num_records, sum(part.index.ntotal for part in parts)
        inside = min(snapshot.records.row_from(end), snapshot.num_rows)
        depth = min(max(count * reach.depth, LEAST_DEPTH), max(held, 1))
        bits = None if allowed.everything and snapshot.num_records >= end and held == inside else allowed.bits
        probes = min(reach.probes, self.cells)
        named = [search_cells(part.index, queries, depth, probes, bits) for part in parts]
        found = [snapshot.records.rows_of(records) for records in named]
        left = snapshot.num_rows - inside
        if left > 0:
            found.append(tail.candidates(queries, min(count, left), snapshot, allowed))
        if left > TAIL_ROWS or held - inside > SWEPT_SHARE * inside:
            self._catch_up(snapshot)
        return np.concatenate(found, 1) if len(found) > 1 else found[0]

    def settle(self) -> None:
        """Wait until the rows that are being put into cells lie there."""
        if (worker := self._worker) is not None:
            worker.join()

    def _build(self, snapshot: Snapshot, progress: Progress | None) -> None:
        """Put all rows into cells, in parts that are kept as they come."""
        for start in range(self.first_later_row(snapshot), snapshot.num_rows, PART_ROWS):
            part = self._part(snapshot, start, min(start + PART_ROWS, snapshot.num_rows), progress)
            self._kept.keep_part(part.index, snapshot, range(self.num_records, part.num_records))
            self._parts = (*self._parts, part)
        if len(self._parts) > 1:
            self._parts = _as_one([(one.index, one) for one in self._parts])
            self._kept.keep_part(self._parts[0].index, snapshot, range(self.num_records))

    def _part(self, snapshot: Snapshot, start: int, end: int, progress: Progress | None = None) -> Loaded:
        """A part of the rows from `start` to `end`, which may be none."""
        part = empty_like(self._trained)
        for first in range(start, end, ADD_ROWS):
            rows = np.arange(first, min(first + ADD_ROWS, end))
            add_rows(part, unit_vectors(self._store, rows, snapshot), snapshot.records.of_rows(rows))
            if progress is not None:
                progress("putting images into cells", int(rows[-1]) + 1, snapshot.num_rows)
        last = snapshot.num_records if end == snapshot.num_rows else int(snapshot.records.of_rows(np.array([end]))[0])
        return Loaded(index=part, num_records=last)

    def _catch_up(self, snapshot: Snapshot) -> None:
        """Begin to put the newest rows into cells and to take out what was purged, unless that is under way."""
        with self._lock:
            if self._worker is not None and self._worker.is_alive():
                return
            self._worker = threading.Thread(target=self._tidy, args=(snapshot,), daemon=True)
            self._worker.start()

    def _tidy(self, snapshot: Snapshot) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own: searches and writers come first
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICER)
        try:
            if self.first_later_row(snapshot) < snapshot.num_rows:
                self._absorb(snapshot)
            if snapshot.num_records >= self.num_records:
                self._sweep(snapshot)
        except KnnDiffusionError:
            return  # the next search meets the same trouble and tells its user

    def _absorb(self, snapshot: Snapshot) -> None:
        """A part of the rows that lie in none, merged with parts before it that are no larger, so that few are searched."""
        added = self._part(snapshot, self.first_later_row(snapshot), snapshot.num_rows)
        parts = list(self._parts)
        while len(parts) > 1 and parts[-1].index.ntotal <= added.index.ntotal:
            added = replace(added, index=merged(parts.pop().index, added.index))
        with self._lock:
            self._parts, self._tail = (*parts, added), Tail(self._store, added.num_records)
            self._generation = max(self._generation, snapshot.generation)
        if added.index.ntotal >= KEPT_ROWS:
            self._kept.keep_part(added.index, snapshot, range(parts[-1].num_records, added.num_records))

    def _sweep(self, snapshot: Snapshot) -> None:
        """One part in the place of all, without what was purged, if that is much."""
        held, inside = sum(part.index.ntotal for part in self._parts), self.first_later_row(snapshot)
        if held - inside <= SWEPT_SHARE * inside:
            return
        whole = merged(*[part.index for part in self._parts])
        drop_others(whole, snapshot.records.spread(np.ones(snapshot.num_rows, bool)))
        swept = Loaded(index=whole, num_records=self.num_records)
        with self._lock:
            self._parts = (swept,)
            self._generation = max(self._generation, snapshot.generation)
        self._kept.keep_part(whole, snapshot, range(swept.num_records))


def shape_of(store: Store, plan: Plan) -> Shape:
    """What an index of this plan is, whatever rows it holds."""
    return Shape(layout=plan.layout, cells=plan.cells, dim=store.encoder.dim)


def _train(store: Store, snapshot: Snapshot, plan: Plan, progress: Progress | None) -> Any:
    """Cells and codes from a sample of the live rows, the same for the same store."""
    live = snapshot.live_rows
    wanted = training_points(len(live), store.encoder.dim, plan.cells)
    draw = np.sort(np.random.default_rng(0).choice(live, wanted, replace=False))
    if progress is not None:
        progress(f"training {plan.cells:,} cells", 0, 1)
    trained = train_index(plan.layout, unit_vectors(store, draw, snapshot), plan.cells)
    if progress is not None:
        progress(f"training {plan.cells:,} cells", 1, 1)
    return trained


def _as_one(parts: Sequence[tuple[Any, Part | Loaded]]) -> tuple[Loaded, ...]:
    """The parts as one, which nobody searches yet."""
    if not parts:
        return ()
    whole, last = parts[0][0], parts[-1][1]
    for index, _ in parts[1:]:
        take_rows(whole, index)
    return (Loaded(index=whole, num_records=last.num_records),)
