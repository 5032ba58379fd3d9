"""Search: exactly K nearest images by cosine, after exclusion and de-duplication, through one protocol.

The index is derived from the store and holds nothing of its own. Scores are cosines with the stored embeddings, computed
one query at a time in float64, so they do not depend on what else is asked at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Float64, Int

from knn_diffusion.device import own_defaults
from knn_diffusion.errors import KnnDiffusionError, StoreError, UsageError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.cell_engine import CellEngine, shape_of
from knn_diffusion.retrieval.dedup import OFF, DedupConfig
from knn_diffusion.retrieval.engines import Allowed, Engine, ExactEngine, FewRowsEngine
from knn_diffusion.retrieval.kept import KeptIndex, kept_cells
from knn_diffusion.retrieval.plan import IndexConfig, Modality, Plan, Reach, plan_for
from knn_diffusion.retrieval.ranking import Ranked, RowsInMemory, Search, Vectors, answer
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
        *,
        modality: Modality = "image",
    ) -> Neighbors:
        """The k nearest images of each query, best first; fewer only when no more are left, and then `shortfall` says so.

        Args:
            exclude_ids: for each query, ids it must not find; unknown ones do no harm.
            where: a condition over id, source, key, added_at and the names of metadata, such as `source LIKE '%fruit%'`.
            modality: what the queries are embeddings of; a search for texts must look further.
        """


FEW_ROWS = 20_000
"""When a condition leaves no more rows than this, they are all compared."""


class LocalRetriever:
    """Searches a store on this machine; any number of threads at a time."""

    def __init__(self, store: Store, settings: IndexConfig | None = None, rule: DedupConfig | None = None) -> None:
        self.store = store
        self.settings = settings or IndexConfig()
        self.rule = rule or DedupConfig()
        self._engine: Engine | None = None
        self._vectors: Vectors = store.embeddings
        self._alive = Allowed(np.zeros(0, bool))
        self._lock = threading.Lock()
        self._renewing: threading.Thread | None = None

    def plan(self) -> Plan:
        """How the images there are now are searched, and what that takes. An index that grew keeps its number of cells."""
        plan, settings = self.new_plan(), self.settings
        cells = self._cells(plan) if settings.cells is None and plan.layout != "exact" else None
        if cells is None or cells == plan.cells:
            return plan
        return plan_for(plan.count, self.store.encoder.dim, replace(settings, cells=cells))

    def new_plan(self) -> Plan:
        """As `plan`, for cells that are trained now."""
        return plan_for(len(self.store), self.store.encoder.dim, self.settings)

    def prepare(self, progress: Progress | None = None) -> Plan:
        """Build what the first search would build, and wait for what is built in the background."""
        if len(self.store):
            engine = self._ready(self.store.snapshot(), progress)
            if self._renewing is not None:
                self._renewing.join()
            if isinstance(engine, CellEngine):
                engine.settle()
        return self.plan()

    def retrain(self, progress: Progress | None = None) -> Plan:
        """Train cells and codes anew on the images there are now and put all images into them.

        Searches go on with the old ones until the new are complete, in other processes too.

        Raises: UsageError where every image is compared; KnnDiffusionError when the disk is full. It is as it was then.
        """
        plan = self.new_plan()
        if plan.layout == "exact":
            raise UsageError(
                f"expected an index that searches in cells, one of {plan.count:,} images compares them all: "
                "there is nothing to train"
            )
        engine = CellEngine(self.store, plan, anew=True, progress=progress)
        vectors = self._chosen_vectors(self.store.snapshot())
        with self._lock:
            self._engine, self._vectors = engine, vectors
        return plan

    def trained(self) -> tuple[Any, int] | None:
        """Cells and codes in use, without the images in them, and the first record that was not there at their training.

        None where every image is compared, and where no cells were trained so far; nothing is built.
        """
        if isinstance(self._engine, CellEngine):
            return self._engine.trained
        plan = self.plan()
        kept = KeptIndex.open(self.store, shape_of(self.store, plan)) if plan.layout != "exact" else None
        index = kept.load_trained() if kept is not None else None
        return (index, kept.trained_records) if kept is not None and index is not None else None

    def imbalance(self) -> float:
        """Times as many images that a query meets in its cells as if all were equally full; 1 where there are none."""
        self.prepare()
        return self._engine.imbalance() if isinstance(self._engine, CellEngine) else 1.0

    @own_defaults()
    def search(
        self,
        queries: Float[np.ndarray, "queries dim"],
        k: int,
        exclude_ids: Sequence[Collection[str]] | None = None,
        where: str | None = None,
        *,
        modality: Modality = "image",
        rule: DedupConfig | None = None,
        drop_copies_of_query: bool = False,
    ) -> Neighbors:
        """The k nearest images of each query, see Retriever.

        As many rows are proposed for every query of a call as for the one that excludes most. In cells, where a neighbor
        may be missed, one that excludes few may so find a neighbor that it misses when it is asked alone.

        Args:
            rule: instead of the index's own; `dedup.OFF` keeps duplicates.
            drop_copies_of_query: queries are images, and near-copies of them must not be found (A.4, as in training).

        Raises: UsageError when k is below 1 or beyond the index, or a query is zero or not finite; FingerprintError when
            the queries have another width; StoreError when the store is damaged.
        """

        def read(snapshot: Snapshot) -> Neighbors:
            units = self._checked(queries, k, exclude_ids, snapshot)
            excluded = [self.store.rows_of(sorted(ids), snapshot) for ids in exclude_ids or [[]] * len(units)]
            search = self._search(
                snapshot, where, rule or self.rule, drop_copies=drop_copies_of_query, with_vectors=True
            )
            return answer(self.store, snapshot, search.run(units, k, excluded, self.settings.reach(modality)), k)

        return self.store.consistently(read)

    @own_defaults()
    def nearest(
        self,
        queries: Float[np.ndarray, "queries dim"],
        k: int,
        *,
        where: str | None = None,
        reach: Reach | None = None,
    ) -> tuple[Int[np.ndarray, "queries k"], Float64[np.ndarray, "queries k"]]:
        """Rows of the store and their cosines, best first, copies kept: to measure, to tune and to build upon.

        Args:
            reach: how far to look; None: as for images.

        Returns: rows, -1 where fewer than k are left, and cosines, 0 there. Raises: as `search`.
        """

        def read(snapshot: Snapshot) -> Ranked:
            units = self._checked(queries, k, None, snapshot)
            search = self._search(snapshot, where, OFF, drop_copies=False, with_vectors=False)
            return search.run(units, k, [_NONE] * len(units), reach or self.settings.image)

        found = self.store.consistently(read)
        return found.rows, found.scores

    def _checked(
        self,
        queries: Float[np.ndarray, "queries dim"],
        k: int,
        exclude_ids: Sequence[Collection[str]] | None,
        snapshot: Snapshot,
    ) -> Float32[np.ndarray, "queries dim"]:
        _check_request(self.store.name, self._live(snapshot).count, len(queries), k, exclude_ids)
        return unit_rows(queries, self.store.encoder.dim, "queries")

    def _search(
        self, snapshot: Snapshot, where: str | None, rule: DedupConfig, *, drop_copies: bool, with_vectors: bool
    ) -> Search:
        engine, allowed = self._ready(snapshot), self._live(snapshot)
        if where is not None:
            allowed = Allowed(self.store.matching(where, snapshot), snapshot.records)
            if allowed.count <= FEW_ROWS and not isinstance(engine, ExactEngine):
                engine = FewRowsEngine(self.store, snapshot, allowed)
        return Search(self.store, self._vectors, engine, snapshot, allowed, rule, drop_copies, with_vectors)

    def _live(self, snapshot: Snapshot) -> Allowed:
        """The rows of the snapshot that are not removed, counted once for all searches of it."""
        alive = self._alive
        if alive.mask is not snapshot.alive:
            self._alive = alive = Allowed(snapshot.alive, snapshot.records)
        return alive

    def _ready(self, snapshot: Snapshot, progress: Progress | None = None) -> Engine:
        """The engine for this many images, built anew when their number asks for another one."""
        with self._lock:
            engine, count = self._engine, self._live(snapshot).count
            exact = count <= self.settings.exact_below if self.settings.layout == "auto" else None
            if engine is None or (exact is not None and exact != isinstance(engine, ExactEngine)):
                self._engine = engine = self._made(snapshot, progress)
            elif isinstance(engine, CellEngine) and not self._is_renewing and engine.superseded(self.plan):
                self._renewing = threading.Thread(target=self._renew, daemon=True)
                self._renewing.start()
            return engine

    @property
    def _is_renewing(self) -> bool:
        return self._renewing is not None and self._renewing.is_alive()

    def _renew(self) -> None:
        """Load the new cells that another process has trained, while searches go on in the old ones."""
        with suppress(KnnDiffusionError):  # then the old ones serve on
            engine = CellEngine(self.store, self.plan())
            with self._lock:
                self._engine = engine

    def _cells(self, plan: Plan) -> int | None:
        """The number of cells in use, None while there are none."""
        if self.store.folder is not None and (cells := kept_cells(self.store.folder, plan.layout)) is not None:
            return cells
        return self._engine.cells if isinstance(self._engine, CellEngine) else None

    def _made(self, snapshot: Snapshot, progress: Progress | None) -> Engine:
        plan = self.plan()
        if plan.layout == "exact":
            return ExactEngine(self.store)
        self._vectors = self._chosen_vectors(snapshot)
        return CellEngine(self.store, plan, progress=progress)

    def _chosen_vectors(self, snapshot: Snapshot) -> Vectors:
        """Where a search in cells reads what it compares."""
        return RowsInMemory(self.store, snapshot) if self.settings.rows_in_memory else self.store.embeddings


_NONE = np.zeros(0, np.int64)


def _check_request(
    name: str, count: int, num_queries: int, k: object, exclude_ids: Sequence[Collection[str]] | None
) -> None:
    if count == 0:
        raise StoreError(f"{name} holds no images: add some before searching")
    if isinstance(k, bool) or not isinstance(k, SupportsIndex):
        raise UsageError(f"k must be a whole number between 1 and {count}, got {k!r}: change k")
    if not 1 <= k.__index__() <= count:
        raise UsageError(
            f"k must be between 1 and {count}, the number of images in {name}, got {k}: change k or add images"
        )
    require_one_each(exclude_ids, num_queries)


def require_one_each(exclude_ids: Sequence[Any] | None, num_queries: int) -> None:
    """Raise UsageError when there is not one list of ids for each query; a text is no list, though it has letters."""
    if isinstance(exclude_ids, str) or any(isinstance(one, str) for one in exclude_ids or ()):
        raise UsageError(
            f"exclude_ids needs a list of ids for each query, got {str(exclude_ids)[:60]!r}: put ids in lists"
        )
    if exclude_ids is not None and len(exclude_ids) != num_queries:
        raise UsageError(
            f"exclude_ids needs one list for each of the {num_queries} queries, got {len(exclude_ids)}: add the rest"
        )
