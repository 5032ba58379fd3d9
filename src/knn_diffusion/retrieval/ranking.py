"""From candidates to exactly K neighbors: ranked by the stored embeddings, without the excluded and without copies.

Candidates are first compared in float32, and those that may stay again in float64: one query at a time, so that nothing
depends on what else is asked at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
_QUERIES = 512  # proposed together, at most
_MAX_PROPOSED = 2**23  # rows proposed together
_MAX_VALUES = 2**24  # of candidate vectors held at once
_BLOCK_VALUES = 2**20  # of them ranked together, so that they stay in the processor's cache
_ONE_THREAD = 2**15  # values that torch widens without its other threads


@dataclass(frozen=True, slots=True)
class Ranked:
    """What was found for each query, best first.

    rows     -1 where none is left
    scores   cosines, 0 where none is left
    vectors  as stored; of width 0 where nobody needs them
    """

    rows: Int64[np.ndarray, "queries count"]
    scores: Float64[np.ndarray, "queries count"]
    vectors: Float32[np.ndarray, "queries count width"]

    def take(self, places: Int[np.ndarray, "queries some"]) -> Ranked:
        """What stands at these places, ABSENT at the place -1."""
        queries = np.arange(len(places))[:, None]
        rows = np.where(places < 0, ABSENT, self.rows[queries, places])
        return Ranked(rows, self.scores[queries, places], self.vectors[queries, places])

    def put(self, queries: Int[np.ndarray, "some"], found: Ranked) -> None:
        """Write over what was found for some queries."""
        for own, new in zip(self._arrays, found._arrays, strict=True):
            own[queries] = new

    def padded(self, count: int) -> Ranked:
        """With so many places for each query, filled up or cut."""
        rows, scores, vectors = (one[:, :count] for one in self._arrays)
        scores[rows < 0] = 0
        if (missing := count - rows.shape[1]) > 0:
            rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=ABSENT)
            scores = np.pad(scores, ((0, 0), (0, missing)))
            vectors = np.pad(vectors, ((0, 0), (0, missing), (0, 0)))
        return Ranked(rows, scores, vectors)

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.rows, self.scores, self.vectors


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
    with_vectors: bool

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
            shape = (len(units), 0)
            nothing = Ranked(np.empty(shape, np.int64), np.empty(shape), np.empty((*shape, units.shape[1]), np.float32))
            return nothing.padded(k)
        fetch = min(self._first_fetch(k, excluded), total)
        found = self._look(units, k, excluded, fetch, reach)
        while len(pending := np.flatnonzero(found.rows[:, -1] < 0)):
            if fetch == total and self.engine.looks_everywhere(reach.times(effort)):
                break
            fetch, effort = min(2 * fetch, total), 2 * effort
            some = [excluded[query] for query in pending.tolist()]
            found.put(pending, self._look(units[pending], k, some, fetch, reach.times(effort)))
        return found

    def _look(
        self,
        units: Float32[np.ndarray, "queries dim"],
        k: int,
        excluded: Sequence[np.ndarray],
        fetch: int,
        reach: Reach,
    ) -> Ranked:
        """The best k of so many candidates, for a bounded number of queries at a time."""
        parts, together = [], min(_QUERIES, max(1, _MAX_PROPOSED // (fetch * reach.depth)))
        for start in range(0, len(units), together):
            end = min(start + together, len(units))
            proposed = self.engine.candidates(units[start:end], fetch, self.snapshot, self.allowed, reach)
            step = max(1, _MAX_VALUES // (proposed.shape[1] * units.shape[1]))
            for first in range(start, end, step):
                some = slice(first, min(first + step, end))
                part = proposed[some.start - start : some.stop - start]
                parts.append(self._best(units[some], part, k, fetch, excluded[some]))
        if len(parts) == 1:
            return parts[0]
        return Ranked(*(np.concatenate(arrays) for arrays in zip(*(part._arrays for part in parts), strict=True)))

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
        found = self._ranked(units, proposed, fetch)
        for query, gone in enumerate(excluded):
            if len(gone):
                found.rows[query, np.isin(found.rows[query], gone)] = ABSENT
        if self._choosy:
            found = found.take(self._different(units, found, k))
        elif any(map(len, excluded)):
            found = found.take(np.argsort(found.rows < 0, axis=1, kind="stable"))
        if not self.with_vectors:
            found = replace(found, vectors=found.vectors[:, :, :0])
        return found.padded(k)

    def _ranked(
        self, units: Float32[np.ndarray, "queries dim"], proposed: Int[np.ndarray, "queries found"], fetch: int
    ) -> Ranked:
        """The `fetch` candidates of the largest cosine; equal ones in the order they were added."""
        count, (num_queries, dim) = min(fetch, proposed.shape[1]), units.shape
        width = dim if self._choosy or self.with_vectors else 0
        shape = (num_queries, count)
        out = Ranked(np.empty(shape, np.int64), np.empty(shape), np.empty((*shape, width), np.float32))
        step = max(1, _BLOCK_VALUES // (proposed.shape[1] * dim))
        for start in range(0, num_queries, step):
            some = slice(start, start + step)
            stored = self._vectors(proposed[some])
            out.rows[some], out.scores[some], places = ranked(stored, units[some], proposed[some], count)
            if width:
                out.vectors[some] = np.take_along_axis(stored, places[:, :, None], 1)
        return out

    def _vectors(self, rows: Int[np.ndarray, "queries found"]) -> Float32[np.ndarray, "queries found dim"]:
        """The stored vectors, those of the first row where a row is absent."""
        stored = self.vectors(np.maximum(rows, 0).ravel(), self.snapshot)
        return widened(stored).reshape(*rows.shape, -1)

    def _different(
        self, units: Float32[np.ndarray, "queries dim"], found: Ranked, k: int
    ) -> Int[np.ndarray, "queries k"]:
        """Places of the first k candidates that show different pictures, -1 where too few do."""
        vectors = torch.nn.functional.normalize(torch.from_numpy(found.vectors), dim=-1)
        pictures, valid = self._pictures(found.rows), torch.from_numpy(found.rows >= 0)
        if self.drop_copies:
            unknown = torch.full_like(pictures[:, 0], ABSENT)
            valid &= ~duplicates(torch.from_numpy(units), unknown, vectors, pictures, self.rule)
        return first_different(vectors, pictures, valid, k, self.rule).numpy()

    def _pictures(self, rows: Int[np.ndarray, "queries found"]) -> torch.Tensor:
        pictures, known = self.store.thumbnails(np.maximum(rows, 0).ravel(), self.snapshot)
        wide = pictures.astype(np.int16)
        wide[~known] = ABSENT
        return torch.from_numpy(wide).view(*rows.shape, -1)


def answer(store: Store, snapshot: Snapshot, found: Ranked, k: int) -> Neighbors:
    """Ids, scores and stored embeddings of what was found, and how many are missing."""
    here = found.rows >= 0
    named = iter(store.facts(found.rows[here], snapshot))
    ids = [[next(named)[0] if one else "" for one in query] for query in here]
    return Neighbors(
        ids=ids,
        scores=found.scores.astype(np.float32),
        embeddings=np.where(here[:, :, None], found.vectors, np.float32(0)),
        shortfall=(k - here.sum(1)).astype(np.int64),
    )


def widened(stored: Float16[np.ndarray, "rows dim"]) -> Float32[np.ndarray, "rows dim"]:
    """The same numbers as float32: by torch, which NumPy takes six times as long for, and on one thread.

    Torch's threads would wait for more work while those of faiss want the processors: on two of them, with as many threads,
    a batch took twice as long as on one thread.
    """
    if torch.get_num_threads() == 1:
        return torch.from_numpy(stored).float().numpy()
    out = np.empty(stored.shape, np.float32)
    narrow, wide = torch.from_numpy(stored).view(-1), torch.from_numpy(out).view(-1)
    for start in range(0, len(narrow), _ONE_THREAD):
        wide[start : start + _ONE_THREAD].copy_(narrow[start : start + _ONE_THREAD])
    return out


def ranked(
    stored: Float32[np.ndarray, "queries found dim"],
    units: Float32[np.ndarray, "queries dim"],
    proposed: Int[np.ndarray, "queries found"],
    count: int,
) -> tuple[
    Int64[np.ndarray, "queries count"], Float64[np.ndarray, "queries count"], Int64[np.ndarray, "queries count"]
]:
    """The `count` of each query's proposed rows with the largest cosine; equal ones in the order of their numbers.

    Returns: rows, their cosines, and their places among the proposed.
    """
    queries = np.arange(len(units))[:, None]
    kept = None
    if proposed.shape[1] > count + SPARE:
        rough = np.einsum("qfd,qd->qf", stored, units)
        rough[proposed < 0] = -np.inf
        kept = np.argpartition(-rough, count + SPARE - 1, axis=1)[:, : count + SPARE]
        stored, proposed = stored[queries, kept], proposed[queries, kept]
    exact = cosines(stored, units)
    exact[proposed < 0] = -np.inf
    order = np.lexsort((proposed, -exact))[:, :count]
    return proposed[queries, order], exact[queries, order], order if kept is None else kept[queries, order]


def cosines(
    stored: Float[np.ndarray, "queries found dim"], units: Float32[np.ndarray, "queries dim"]
) -> Float64[np.ndarray, "queries found"]:
    """Cosines of stored vectors with the unit vector of their query, in float64, each as if it were computed alone."""
    wide = stored.astype(np.float64)
    products = np.einsum("qfd,qd->qf", wide, units.astype(np.float64))
    return products / np.sqrt(np.einsum("qfd,qfd->qf", wide, wide))
