"""Search: exactly K nearest images by cosine, after exclusion and de-duplication, through one protocol.

The index is derived from the store and holds nothing of its own. Scores are cosines with the stored embeddings, computed
one query at a time in float64, so they do not depend on what else is asked at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int

from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.retrieval.dedup import OFF, DedupConfig, duplicates, first_different, gather
from knn_diffusion.retrieval.engines import CellEngine, Engine, ExactEngine, IndexConfig
from knn_diffusion.retrieval.segments import Snapshot, unit_rows
from knn_diffusion.retrieval.store import Store
from knn_diffusion.shapes import Neighbors


@runtime_checkable
class Retriever(Protocol):
    """Anything that finds neighbors: this machine's index or a distributed service."""

    def search(
        self,
        queries: Float[np.ndarray, "queries dim"],
        k: int,
        exclude_ids: Sequence[Collection[str]] | None = None,
        where: str | None = None,
    ) -> Neighbors:
        """The k nearest images of each query, best first; fewer only when no more are left, and then `shortfall` says so.

        Args:
            exclude_ids: for each query, ids it must not find; unknown ones do no harm.
            where: a condition over id, source, key and added_at, such as `source LIKE '%fruit%'`.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How an index of this size is searched, and what that takes."""

    engine: str
    count: int
    memory_bytes: int
    reason: str


class LocalRetriever:
    """Searches a store on this machine; any number of threads at a time."""

    def __init__(self, store: Store, settings: IndexConfig | None = None, rule: DedupConfig | None = None) -> None:
        self.store = store
        self.settings = settings or IndexConfig()
        self.rule = rule or DedupConfig()
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    def plan(self) -> Plan:
        """Which engine serves the images there are now, and its memory."""
        count, num_rows, dim = len(self.store), self.store.snapshot().num_rows, self.store.encoder.dim
        limit = self.settings.exact_below
        if count <= limit:
            memory = 4 * dim * num_rows
            return Plan(engine="exact", count=count, memory_bytes=memory, reason=f"{count} images are at most {limit}")
        cells = self.settings.num_cells(count)
        memory = num_rows * (dim // 2 * self.settings.code_bits // 8 + 8) + 4 * dim * (cells + dim)
        engine = f"faiss OPQ, {cells} cells, {self.settings.num_probes} probes, PQ"
        return Plan(engine=engine, count=count, memory_bytes=memory, reason=f"{count} images are more than {limit}")

    def prepare(self) -> Plan:
        """Build what the first search would build."""
        if len(self.store):
            self._ready(self.store.snapshot())
        return self.plan()

    def search(
        self,
        queries: Float[np.ndarray, "queries dim"],
        k: int,
        exclude_ids: Sequence[Collection[str]] | None = None,
        where: str | None = None,
        *,
        rule: DedupConfig | None = None,
        drop_copies_of_query: bool = False,
    ) -> Neighbors:
        """The k nearest images of each query, see Retriever.

        Args:
            rule: instead of the index's own; `dedup.OFF` keeps duplicates.
            drop_copies_of_query: queries are images, and near-copies of them must not be found (A.4, as in training).

        Raises: UsageError when k is below 1 or beyond the index, or a query is zero or not finite; FingerprintError when
            the queries have another width; StoreError when the store is damaged.
        """
        snapshot = self.store.snapshot()
        allowed = self.store.matching(where, snapshot) if where is not None else snapshot.alive
        _check_request(self.store.name, int(snapshot.alive.sum()), len(queries), k, exclude_ids)
        units = unit_rows(queries, self.store.encoder.dim, "queries")
        rule = rule or self.rule
        excluded = [self.store.rows_of(sorted(ids)) for ids in exclude_ids] if exclude_ids else [_NONE] * len(units)
        search = _Search(self.store, self._ready(snapshot), snapshot, allowed, rule, drop_copies_of_query)
        return search.run(units, k, excluded)

    def _ready(self, snapshot: Snapshot) -> Engine:
        """The engine for this many images, built or built anew when the size asks for it."""
        with self._lock:
            exact = int(snapshot.alive.sum()) <= self.settings.exact_below
            engine = self._engine
            outgrown = isinstance(engine, CellEngine) and engine.outgrown(snapshot)
            if engine is None or outgrown or exact != isinstance(engine, ExactEngine):
                self._engine = engine = ExactEngine(self.store) if exact else CellEngine(self.store, self.settings)
            return engine


_NONE = np.zeros(0, np.int64)
_QUERIES = 256  # compared together, to bound memory


@dataclass(frozen=True, slots=True)
class _Search:
    """One call of `search`: what it sees and by which rules."""

    store: Store
    engine: Engine
    snapshot: Snapshot
    allowed: Bool[np.ndarray, "rows"]
    rule: DedupConfig
    drop_copies: bool

    def run(self, units: Float32[np.ndarray, "queries dim"], k: int, excluded: list[np.ndarray]) -> Neighbors:
        """Fetch more and more candidates until k remain for every query or nothing is left."""
        found: list[tuple[np.ndarray, np.ndarray]] = [(_NONE, _NONE)] * len(units)
        fetch, effort, pending = self._first_fetch(k, excluded), 1, list(range(len(units)))
        total = int(self.allowed.sum())
        while pending and total:
            fetch = min(fetch, total)
            for start in range(0, len(pending), _QUERIES):
                some = pending[start : start + _QUERIES]
                proposed = self.engine.candidates(units[some], fetch, self.snapshot, self.allowed, effort)
                for query, rows in zip(some, proposed, strict=True):
                    found[query] = self._best(units[query], rows[rows >= 0], k, fetch, excluded[query])
            if fetch == total and self.engine.looks_everywhere(effort):
                break
            pending = [query for query in pending if len(found[query][0]) < k]
            fetch, effort = 2 * fetch, 2 * effort
        return self._answer(found, k)

    def _first_fetch(self, k: int, excluded: list[np.ndarray]) -> int:
        spare = k + 8 if self.rule != OFF or self.drop_copies else 0
        return k + spare + max((len(rows) for rows in excluded), default=0)

    def _best(
        self,
        unit: Float32[np.ndarray, "dim"],
        rows: Int[np.ndarray, "found"],
        k: int,
        fetch: int,
        excluded: Int[np.ndarray, "excluded"],
    ) -> tuple[Int[np.ndarray, "kept"], Float64[np.ndarray, "kept"]]:
        """The best k of the candidates and their cosines, without the excluded, the copies, and all beyond `fetch`."""
        scores = cosines(self.store.embeddings(rows, self.snapshot), unit)
        order = np.lexsort((rows, -scores))[:fetch]
        rows, scores = rows[order], scores[order]
        keep = ~np.isin(rows, excluded)
        rows, scores = rows[keep], scores[keep]
        if not len(rows) or (self.rule == OFF and not self.drop_copies):
            return rows[:k], scores[:k]
        vectors, pictures = gather(self.store, rows)
        valid = torch.ones(1, len(rows), dtype=torch.bool)
        if self.drop_copies:
            no_picture = torch.full_like(pictures[:1], -1)
            valid &= ~duplicates(torch.from_numpy(unit)[None], no_picture, vectors[None], pictures[None], self.rule)
        places = first_different(vectors[None], pictures[None], valid, k, self.rule)[0].numpy()
        places = places[places >= 0]
        return rows[places], scores[places]

    def _answer(self, found: list[tuple[np.ndarray, np.ndarray]], k: int) -> Neighbors:
        dim = self.store.encoder.dim
        scores = np.zeros((len(found), k), np.float32)
        embeddings = np.zeros((len(found), k, dim), np.float32)
        ids: list[list[str]] = []
        for query, (rows, cosine) in enumerate(found):
            scores[query, : len(rows)] = cosine
            embeddings[query, : len(rows)] = self.store.embeddings(rows, self.snapshot)
            ids.append([item.id for item in self.store.items(rows)] + [""] * (k - len(rows)))
        shortfall = np.array([k - len(rows) for rows, _ in found], np.int64)
        return Neighbors(ids=ids, scores=scores, embeddings=embeddings, shortfall=shortfall)


def cosines(stored: Float[np.ndarray, "rows dim"], unit: Float32[np.ndarray, "dim"]) -> Float64[np.ndarray, "rows"]:
    """Cosine of each stored vector with a unit vector, in float64."""
    wide = stored.astype(np.float64)
    return wide @ unit.astype(np.float64) / np.linalg.norm(wide, axis=1)


def _check_request(
    name: str, count: int, num_queries: int, k: int, exclude_ids: Sequence[Collection[str]] | None
) -> None:
    if count == 0:
        raise StoreError(f"{name} holds no images: add some before searching")
    if not 1 <= k <= count:
        raise UsageError(
            f"k must be between 1 and {count}, the number of images in {name}, got {k}: change k or add images"
        )
    if exclude_ids is not None and len(exclude_ids) != num_queries:
        raise UsageError(
            f"exclude_ids needs one list for each of the {num_queries} queries, got {len(exclude_ids)}: add the rest"
        )
