"""Search in cells, with codes: built in parts that survive an interruption, and growing while it serves.

Rows lie in parts, each a faiss index of the same cells and codes: one for what was there when the index was built, and
smaller ones for what came later. The newest rows of all are compared one by one until a thread in the background has put
them into a part; no search waits for it, and parts are replaced, never changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from knn_diffusion.errors import KnnDiffusionError
from knn_diffusion.retrieval.cells import add_rows, empty_like, merged, num_cells, search_cells, take_rows, train_index
from knn_diffusion.retrieval.engines import Allowed, ExactEngine, unit_vectors
from knn_diffusion.retrieval.kept import KeptIndex, Part, Shape
from knn_diffusion.retrieval.plan import Plan, Reach, training_points
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

Progress = Callable[[str, int, int], None]

PART_ROWS = 2**20
"""Rows after which a build is kept on the disk."""
TAIL_ROWS = 4096
"""So many rows are compared one by one before they are put into cells."""
KEPT_ROWS = 65_536
"""A part of later rows is worth a file of its own from so many on."""
ADD_ROWS = 16_384
LEAST_DEPTH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A part in memory: rows from where the part before it ends up to `num_rows`, which end with a segment."""

    index: Any
    num_segments: int
    num_rows: int


class CellEngine:
    """Cells and codes over a store's rows; what is kept in the store's `cache/` folder is used again."""

    def __init__(self, store: Store, plan: Plan, *, progress: Progress | None = None) -> None:
        snapshot = store.snapshot()
        self._store, self._lock = store, threading.Lock()
        self._worker: threading.Thread | None = None
        shape = Shape(layout=plan.layout, cells=plan.cells, dim=store.encoder.dim)
        self._kept = KeptIndex.open(store, shape, snapshot)
        self._trained = self._kept.load_trained()
        if self._trained is None:
            self._trained = _train(store, snapshot, plan, progress)
            self._kept.keep_trained(self._trained)
        self._cells = num_cells(self._trained)
        self._parts = _as_one(self._kept.load_parts())
        if not self._parts or snapshot.num_rows - self.num_rows > max(self.num_rows // 4, KEPT_ROWS):
            self._build(snapshot, progress)
        self._segments = snapshot.numbers[: self._parts[-1].num_segments]
        self._tail = ExactEngine(store, self.num_rows)

    @property
    def num_rows(self) -> int:
        """Rows that lie in cells; later ones are compared one by one."""
        return self._parts[-1].num_rows if self._parts else 0

    def looks_everywhere(self, reach: Reach) -> bool:
        """When the probes reach all cells."""
        return reach.probes >= self._cells

    def serves(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot's segments begin with those that lie in cells."""
        return snapshot.numbers[: len(self._segments)] == self._segments

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
        depth = min(max(count * reach.depth, LEAST_DEPTH), max(parts[-1].num_rows, 1))
        bits = None if allowed.everything and snapshot.num_rows >= parts[-1].num_rows else allowed.bits
        probes = min(reach.probes, self._cells)
        found = [search_cells(part.index, queries, depth, probes, bits) for part in parts]
        left = snapshot.num_rows - parts[-1].num_rows
        if left > 0:
            found.append(tail.candidates(queries, min(count, left), snapshot, allowed))
        if left > TAIL_ROWS:
            self._catch_up(snapshot)
        return np.concatenate(found, 1) if len(found) > 1 else found[0]

    def settle(self) -> None:
        """Wait until the rows that are being put into cells lie there."""
        if (worker := self._worker) is not None:
            worker.join()

    def _build(self, snapshot: Snapshot, progress: Progress | None) -> None:
        """Put all rows into cells, in parts that are kept as they come."""
        part, done, first = empty_like(self._trained), self.num_rows, self.num_rows
        begun = self._parts[-1].num_segments if self._parts else 0
        for number, segment in enumerate(snapshot.segments[begun:], begun + 1):
            done = self._add(part, snapshot, done, done + segment.num_rows, progress)
            if done - first >= PART_ROWS and number < len(snapshot.segments):
                self._kept.keep_part(part, snapshot, number)
                self._parts = (*self._parts, Loaded(index=part, num_segments=number, num_rows=done))
                part, first = empty_like(self._trained), done
        last = Loaded(index=part, num_segments=len(snapshot.segments), num_rows=done)
        self._kept.keep_part(part, snapshot, len(snapshot.segments))
        self._parts = (*self._parts, last)
        if len(self._parts) > 1:
            self._parts = _as_one([(one.index, one) for one in self._parts])
            self._kept.keep_part(self._parts[0].index, snapshot, last.num_segments, instead_of=len(self._kept.parts))

    def _add(self, part: Any, snapshot: Snapshot, start: int, end: int, progress: Progress | None = None) -> int:
        for first in range(start, end, ADD_ROWS):
            rows = np.arange(first, min(first + ADD_ROWS, end))
            add_rows(part, unit_vectors(self._store, rows, snapshot), first)
            if progress is not None:
                progress("putting images into cells", int(rows[-1]) + 1, snapshot.num_rows)
        return end

    def _catch_up(self, snapshot: Snapshot) -> None:
        """Begin to put the newest rows into cells, unless that is under way."""
        with self._lock:
            if self._worker is not None and self._worker.is_alive():
                return
            self._worker = threading.Thread(target=self._absorb, args=(snapshot,), daemon=True)
            self._worker.start()

    def _absorb(self, snapshot: Snapshot) -> None:
        """A part of the rows that lie in none, merged with parts before it that are no larger, so that few are searched."""
        try:
            new = empty_like(self._trained)
            self._add(new, snapshot, self.num_rows, snapshot.num_rows)
            parts, size = list(self._parts), snapshot.num_rows - self.num_rows
            while len(parts) > 1 and parts[-1].num_rows - parts[-2].num_rows <= size:
                size += parts[-1].num_rows - parts[-2].num_rows
                new = merged(parts.pop().index, new)
        except KnnDiffusionError:
            return  # the next search meets the same trouble and tells its user
        added = Loaded(index=new, num_segments=len(snapshot.segments), num_rows=snapshot.num_rows)
        with self._lock:
            self._parts, self._tail = (*parts, added), ExactEngine(self._store, added.num_rows)
            self._segments = snapshot.numbers
        if size >= KEPT_ROWS:
            kept = self._kept.parts
            covered = sum(1 for part in kept if part.num_rows > parts[-1].num_rows)
            self._kept.keep_part(new, snapshot, added.num_segments, instead_of=covered)


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
    return (Loaded(index=whole, num_segments=last.num_segments, num_rows=last.num_rows),)
