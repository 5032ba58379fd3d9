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
_QUERIES = 512  # proposed together
_MAX_VALUES = 2**24  # of candidate vectors held at once
_BLOCK_VALUES = 2**20  # of them ranked together, so that they stay in the processor's cache

Ranked = tuple[Int64[np.ndarray, "queries count"], Float64[np.ndarray, "queries count"]]
"""Rows, best first, -1 where none is left, and their cosines, 0 there."""

Vectors = Callable[[np.ndarray, Snapshot], np.ndarray]
"""(rows, snapshot) -> the stored float16 vectors of these rows: `Store.embeddings`, or `RowsInMemory`."""


class RowsInMemory:
    """The stored vectors in one array; those of rows added later are read from the store.

    A compaction numbers rows anew and leaves the array as it is: what lies where follows from the records.
    """

    def __init__(self, store: Store, snapshot: Snapshot) -> None:
        self._store, self._records = store, snapshot.records
        self._known = store.embeddings(np.arange(snapshot.num_rows), snapshot)

    def __call__(self, rows: Int[np.ndarray, "rows"], snapshot: Snapshot) -> Float16[np.ndarray, "rows dim"]:
        """The stored vectors of these rows."""
        places = rows
        if snapshot.records is not self._records:
            places = self._records.rows_of(snapshot.records.of_rows(rows))
        later = (places < 0) | (places >= len(self._known))
        if not later.any():
            return self._known.take(places, axis=0)
        out = self._known.take(np.where(later, 0, places), axis=0)
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
        total, effort = self.allowed.count, 1
        if not total or not len(units):
            return np.full((len(units), k), ABSENT, np.int64), np.zeros((len(units), k))
        fetch = min(self._first_fetch(k, excluded), total)
        rows, scores = self._look(units, k, excluded, fetch, reach)
        while len(pending := np.flatnonzero(rows[:, -1] < 0)):
            if fetch == total and self.engine.looks_everywhere(reach.times(effort)):
                break
            fetch, effort = min(2 * fetch, total), 2 * effort
            some = [excluded[query] for query in pending.tolist()]
            rows[pending], scores[pending] = self._look(units[pending], k, some, fetch, reach.times(effort))
        return rows, scores

    def _look(
        self,
        units: Float32[np.ndarray, "queries dim"],
        k: int,
        excluded: Sequence[np.ndarray],
        fetch: int,
        reach: Reach,
    ) -> Ranked:
        """The best k of so many candidates, for a bounded number of queries at a time."""
        parts = []
        for start in range(0, len(units), _QUERIES):
            some = slice(start, start + _QUERIES)
            proposed = self.engine.candidates(units[some], fetch, self.snapshot, self.allowed, reach)
            parts.append(self._best(units[some], proposed, k, fetch, excluded[some]))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([rows for rows, _ in parts]), np.concatenate([scores for _, scores in parts])

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
        if self._choosy:
            rows, scores = _taken(rows, scores, self._different(units, rows, k))
        elif any(map(len, excluded)):
            rows, scores = _taken(rows, scores, np.argsort(rows < 0, axis=1, kind="stable"))
        rows, scores = rows[:, :k], scores[:, :k]
        scores[rows < 0] = 0
        if rows.shape[1] < k:
            short = ((0, 0), (0, k - rows.shape[1]))
            rows, scores = np.pad(rows, short, constant_values=ABSENT), np.pad(scores, short)
        return rows, scores

    def _ranked(
        self, units: Float32[np.ndarray, "queries dim"], proposed: Int[np.ndarray, "queries found"], fetch: int
    ) -> Ranked:
        """The `fetch` candidates of the largest cosine; equal ones in the order they were added."""
        count = min(fetch, proposed.shape[1])
        rows, scores = np.empty((len(units), count), np.int64), np.empty((len(units), count))
        step = max(1, _BLOCK_VALUES // (proposed.shape[1] * units.shape[1]))
        for start in range(0, len(units), step):
            some = slice(start, start + step)
            rows[some], scores[some] = ranked(self._vectors(proposed[some]), units[some], proposed[some], count)
        return rows, scores

    def _vectors(self, rows: Int[np.ndarray, "queries found"]) -> Float32[np.ndarray, "queries found dim"]:
        """The stored vectors, those of the first row where a row is absent; torch widens them faster than NumPy."""
        stored = self.vectors(np.maximum(rows, 0).ravel(), self.snapshot)
        return torch.from_numpy(stored).float().numpy().reshape(*rows.shape, -1)

    def _different(
        self, units: Float32[np.ndarray, "queries dim"], rows: Int[np.ndarray, "queries found"], k: int
    ) -> Int[np.ndarray, "queries k"]:
        """Places of the first k candidates that show different pictures, -1 where too few do; a few queries at a time."""
        out = np.full((len(rows), k), ABSENT, np.int64)
        step = max(1, _MAX_VALUES // (rows.shape[1] * units.shape[1]))
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            vectors = torch.nn.functional.normalize(torch.from_numpy(self._vectors(rows[some])), dim=-1)
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


def _taken(
    rows: Int64[np.ndarray, "queries found"],
    scores: Float64[np.ndarray, "queries found"],
    places: Int[np.ndarray, "queries some"],
) -> Ranked:
    """What stands at these places, ABSENT at the place -1."""
    queries = np.arange(len(rows))[:, None]
    return np.where(places < 0, ABSENT, rows[queries, places]), scores[queries, places]


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


def ranked(
    stored: Float32[np.ndarray, "queries found dim"],
    units: Float32[np.ndarray, "queries dim"],
    proposed: Int[np.ndarray, "queries found"],
    count: int,
) -> Ranked:
    """The `count` of each query's proposed rows with the largest cosine; equal ones in the order of their numbers."""
    queries = np.arange(len(units))[:, None]
    if proposed.shape[1] > count + SPARE:
        rough = np.matmul(stored, units[:, :, None])[:, :, 0]
        rough[proposed < 0] = -np.inf
        kept = np.argpartition(-rough, count + SPARE - 1, axis=1)[:, : count + SPARE]
        stored, proposed = stored[queries, kept], proposed[queries, kept]
    exact = cosines(stored, units)
    exact[proposed < 0] = -np.inf
    order = np.lexsort((proposed, -exact))[:, :count]
    return proposed[queries, order], exact[queries, order]


def cosines(
    stored: Float[np.ndarray, "queries found dim"], units: Float32[np.ndarray, "queries dim"]
) -> Float64[np.ndarray, "queries found"]:
    """Cosines of stored vectors with the unit vector of their query, in float64, each as if it were computed alone."""
    wide = stored.astype(np.float64)
    products = np.einsum("qfd,qd->qf", wide, units.astype(np.float64))
    return products / np.sqrt(np.einsum("qfd,qfd->qf", wide, wide))
