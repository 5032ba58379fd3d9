"""From candidates to exactly K neighbors: ranked by the stored embeddings, without the excluded and without copies.

Candidates are first compared in float32, and those that may stay again in float64: one query at a time, so that nothing
depends on what else is asked at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Float64, Int, Int64

from knn_diffusion.retrieval.dedup import OFF, DedupConfig, duplicates, first_different
from knn_diffusion.retrieval.engines import Allowed, Engine
from knn_diffusion.retrieval.plan import Reach
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store
from knn_diffusion.shapes import Neighbors

ABSENT = -1
SPARE = 8
"""Candidates kept beyond those asked for: for near-copies, and for what float32 ranks differently than float64."""
_QUERIES = 256  # proposed together
_MAX_VALUES = 2**24  # of candidate vectors held at once

Ranked = tuple[Int64[np.ndarray, "queries count"], Float64[np.ndarray, "queries count"]]
"""Rows, best first, -1 where none is left, and their cosines, 0 there."""

Vectors = Callable[[np.ndarray, Snapshot], np.ndarray]
"""(rows, snapshot) -> the stored float16 vectors of these rows: `Store.embeddings`, or `RowsInMemory`."""


class RowsInMemory:
    """The stored vectors in one array; those of rows added later are read from the store."""

    def __init__(self, store: Store, snapshot: Snapshot) -> None:
        self._store = store
        self._known = store.embeddings(np.arange(snapshot.num_rows), snapshot)

    def __call__(self, rows: Int[np.ndarray, "rows"], snapshot: Snapshot) -> Float16[np.ndarray, "rows dim"]:
        """The stored vectors of these rows."""
        later = rows >= len(self._known)
        if not later.any():
            return self._known.take(rows, axis=0)
        out = self._known.take(np.where(later, 0, rows), axis=0)
        out[later] = self._store.embeddings(rows[later], snapshot)
        return out


@dataclass(frozen=True, slots=True)
class Search:
    """One call of `search`: what it sees and by which rules."""

    store: Store
    vectors: Vectors
    engine: Engine
    snapshot: Snapshot
    allowed: Allowed
    rule: DedupConfig
    drop_copies: bool

    def run(
        self,
        units: Float32[np.ndarray, "queries dim"],
        k: int,
        excluded: Sequence[np.ndarray],
        reach: Reach,
    ) -> Ranked:
        """Look further and further until k neighbors remain for every query or everything was looked at."""
        rows, scores = np.full((len(units), k), ABSENT, np.int64), np.zeros((len(units), k))
        total = self.allowed.count
        fetch, effort, pending = self._first_fetch(k, excluded), 1, np.arange(len(units))
        while len(pending) and total:
            fetch, farther = min(fetch, total), reach.times(effort)
            for start in range(0, len(pending), _QUERIES):
                some = pending[start : start + _QUERIES]
                proposed = self.engine.candidates(units[some], fetch, self.snapshot, self.allowed, farther)
                rows[some], scores[some] = self._best(units[some], proposed, k, fetch, [excluded[q] for q in some])
            if fetch == total and self.engine.looks_everywhere(farther):
                break
            pending = pending[rows[pending, -1] < 0]
            fetch, effort = 2 * fetch, 2 * effort
        return rows, scores

    def _first_fetch(self, k: int, excluded: Sequence[np.ndarray]) -> int:
        spare = k + SPARE if self._choosy else 0
        return k + spare + max((len(rows) for rows in excluded), default=0)

    @property
    def _choosy(self) -> bool:
        return self.rule != OFF or self.drop_copies

    def _best(
        self,
        units: Float32[np.ndarray, "queries dim"],
        proposed: Int[np.ndarray, "queries found"],
        k: int,
        fetch: int,
        excluded: Sequence[np.ndarray],
    ) -> Ranked:
        """The best k of the candidates, without the excluded, the copies, and all beyond `fetch`."""
        rows, scores = self._ranked(units, proposed, fetch)
        for query, gone in enumerate(excluded):
            if len(gone):
                rows[query, np.isin(rows[query], gone)] = ABSENT
        order = self._different(units, rows, k) if self._choosy else np.argsort(rows < 0, axis=1, kind="stable")[:, :k]
        rows = np.where(order < 0, ABSENT, np.take_along_axis(rows, np.maximum(order, 0), 1))
        scores = np.where(rows < 0, 0, np.take_along_axis(scores, np.maximum(order, 0), 1))
        if rows.shape[1] < k:
            short = ((0, 0), (0, k - rows.shape[1]))
            rows, scores = np.pad(rows, short, constant_values=ABSENT), np.pad(scores, short)
        return rows, scores

    def _ranked(
        self, units: Float32[np.ndarray, "queries dim"], proposed: Int[np.ndarray, "queries found"], fetch: int
    ) -> Ranked:
        """The `fetch` candidates of the largest cosine; equal ones in the order they were added."""
        count = min(fetch, proposed.shape[1])
        rows, scores = np.full((len(units), count), ABSENT, np.int64), np.full((len(units), count), -np.inf)
        step = max(1, _MAX_VALUES // (proposed.shape[1] * units.shape[1]))
        for start in range(0, len(units), step):
            stored = self._vectors(proposed[start : start + step])
            wide = torch.from_numpy(stored).float().numpy()
            for query, unit in enumerate(units[start : start + step]):
                valid = np.flatnonzero(proposed[start + query] >= 0)
                if len(valid) > count + SPARE:
                    rough = wide[query][valid] @ unit if len(valid) < proposed.shape[1] else wide[query] @ unit
                    valid = valid[np.argpartition(-rough, count + SPARE)[: count + SPARE]]
                exact, named = cosines(stored[query][valid], unit), proposed[start + query][valid]
                order = np.lexsort((named, -exact))[:count]
                rows[start + query, : len(order)] = named[order]
                scores[start + query, : len(order)] = exact[order]
        return rows, scores

    def _vectors(self, rows: Int[np.ndarray, "queries found"]) -> Float16[np.ndarray, "queries found dim"]:
        """The stored vectors, those of the first row where a row is absent."""
        return self.vectors(np.maximum(rows, 0).ravel(), self.snapshot).reshape(*rows.shape, -1)

    def _different(
        self, units: Float32[np.ndarray, "queries dim"], rows: Int[np.ndarray, "queries found"], k: int
    ) -> Int[np.ndarray, "queries k"]:
        """Places of the first k candidates that show different pictures, -1 where too few do; a few queries at a time."""
        out = np.full((len(rows), k), ABSENT, np.int64)
        step = max(1, _MAX_VALUES // (rows.shape[1] * units.shape[1]))
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            vectors = torch.nn.functional.normalize(torch.from_numpy(self._vectors(rows[some])).float(), dim=-1)
            pictures = self._pictures(rows[some])
            valid = torch.from_numpy(rows[some] >= 0)
            if self.drop_copies:
                unknown = torch.full_like(pictures[:, 0], ABSENT)
                valid &= ~duplicates(torch.from_numpy(units[some]), unknown, vectors, pictures, self.rule)
            out[some] = first_different(vectors, pictures, valid, k, self.rule).numpy()
        return out

    def _pictures(self, rows: Int[np.ndarray, "queries found"]) -> torch.Tensor:
        pictures, known = self.store.thumbnails(np.maximum(rows, 0).ravel(), self.snapshot)
        wide = pictures.astype(np.int16)
        wide[~known] = ABSENT
        return torch.from_numpy(wide).view(*rows.shape, -1)


def answer(store: Store, snapshot: Snapshot, ranked: Ranked, k: int) -> Neighbors:
    """Ids, scores and stored embeddings of what was found, and how many are missing."""
    rows, scores = ranked
    found = rows >= 0
    embeddings = np.zeros((*rows.shape, store.encoder.dim), np.float32)
    embeddings[found] = store.embeddings(rows[found], snapshot)
    named = iter(store.items(rows[found], snapshot))
    ids = [[next(named).id if here else "" for here in query] for query in found]
    shortfall = (k - found.sum(1)).astype(np.int64)
    return Neighbors(ids=ids, scores=scores.astype(np.float32), embeddings=embeddings, shortfall=shortfall)


def cosines(stored: Float[np.ndarray, "rows dim"], unit: Float32[np.ndarray, "dim"]) -> Float64[np.ndarray, "rows"]:
    """Cosine of each stored vector with a unit vector, in float64."""
    wide = stored.astype(np.float64)
    return wide @ unit.astype(np.float64) / np.linalg.norm(wide, axis=1)
