"""How far queries must look: recall against time, measured on the index's own images and on given texts.

Texts lie apart from images in H, and an index that finds every image's neighbors may miss a fifth of a text's. So both
are measured, and each gets a reach of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int

from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.engines import unit_vectors
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.plan import Modality, Reach
from knn_diffusion.retrieval.ranking import ABSENT
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

PROBES = (1, 4, 8, 20, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
DEPTHS = (40, 20, 10, 5, 2)
TIMED_QUERIES = 100
BLOCK_ROWS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One reach: the share of the k nearest that it finds, and the median time of one query in milliseconds."""

    reach: Reach
    recall: float
    milliseconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Queries:
    """Queries of one modality with their exact neighbors.

    own       the row of each query if it is an image of the index, which it must not find; -1 otherwise
    truth     rows of the k nearest, best first
    cosines   with them
    generation  of the snapshot that the rows are of
    """

    modality: Modality
    vectors: Float32[np.ndarray, "queries dim"]
    own: Int[np.ndarray, "queries"]
    truth: Int[np.ndarray, "queries k"]
    cosines: Float64[np.ndarray, "queries k"]
    generation: int


def image_queries(store: Store, count: int, k: int, *, records: range | None = None, seed: int = 0) -> Queries:
    """A sample of the index's own images, or of those with some records, each to find its neighbors but itself."""
    snapshot = store.snapshot()
    live = snapshot.live_rows
    if len(live) < k + 2:
        raise UsageError(f"expected an index of more than {k + 1} images to measure k={k} on, got {len(live)}: lower k")
    if records is not None:
        ends = [snapshot.records.row_from(record) for record in (records.start, records.stop)]
        live = live[slice(*np.searchsorted(live, ends))]
    own = np.sort(np.random.default_rng(seed).choice(live, min(count, len(live)), replace=False))
    vectors = unit_vectors(store, own, snapshot)
    rows, cosines = without(*exact_neighbors(store, snapshot, vectors, k + 1), own, k)
    return Queries(
        modality="image", vectors=vectors, own=own, truth=rows, cosines=cosines, generation=snapshot.generation
    )


def text_queries(store: Store, vectors: Float32[np.ndarray, "queries dim"], k: int) -> Queries:
    """Texts by their embeddings."""
    snapshot, own = store.snapshot(), np.full(len(vectors), ABSENT)
    rows, cosines = exact_neighbors(store, snapshot, vectors, k)
    return Queries(
        modality="text", vectors=vectors, own=own, truth=rows, cosines=cosines, generation=snapshot.generation
    )


def exact_neighbors(
    store: Store, snapshot: Snapshot, vectors: Float32[np.ndarray, "queries dim"], k: int
) -> tuple[Int[np.ndarray, "queries k"], Float64[np.ndarray, "queries k"]]:
    """The k nearest live rows of each unit vector and their cosines, best first, by comparing all in blocks."""
    best = np.full((len(vectors), k), -np.inf, np.float32)
    rows = np.full((len(vectors), k), ABSENT, np.int64)
    live = snapshot.live_rows
    for start in range(0, len(live), BLOCK_ROWS):
        some = live[start : start + BLOCK_ROWS]
        scores = np.concatenate([best, vectors @ unit_vectors(store, some, snapshot).T], 1)
        numbers = np.concatenate([rows, np.broadcast_to(some, (len(vectors), len(some)))], 1)
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        best, rows = np.take_along_axis(scores, top, 1), np.take_along_axis(numbers, top, 1)
    order = np.argsort(-best, axis=1, kind="stable")
    return np.take_along_axis(rows, order, 1), np.take_along_axis(best, order, 1).astype(np.float64)


def without(
    rows: Int[np.ndarray, "queries found"],
    cosines: Float64[np.ndarray, "queries found"],
    own: Int[np.ndarray, "queries"],
    k: int,
) -> tuple[Int[np.ndarray, "queries k"], Float64[np.ndarray, "queries k"]]:
    """The first k of each query that are not its own row."""
    order = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(cosines, order, 1)


def measure(retriever: LocalRetriever, queries: Queries, reach: Reach) -> Measured:
    """Recall of all queries together, and the time of some of them one by one.

    Raises: StoreError when a compaction has numbered the rows anew since the queries were made.
    """
    k = queries.truth.shape[1]
    wanted = min(k + int((queries.own != ABSENT).any()), len(retriever.store))
    rows, cosines = retriever.nearest(queries.vectors, wanted, reach=reach)
    found, _ = without(rows, cosines, queries.own, k)
    hits = [np.isin(one, other).mean() for one, other in zip(queries.truth, found, strict=True)]
    times = []
    for query in queries.vectors[:TIMED_QUERIES]:
        started = time.perf_counter()
        retriever.nearest(query[None], wanted, reach=reach)
        times.append(time.perf_counter() - started)
    if retriever.store.snapshot().generation != queries.generation:
        raise StoreError(f"{retriever.store.name} was compacted while recall was measured on it: measure again")
    return Measured(reach=reach, recall=float(np.mean(hits)), milliseconds=1000 * float(np.median(times)))


def curve(retriever: LocalRetriever, queries: Queries, progress: Progress | None = None) -> list[Measured]:
    """Recall against time for more and more probes, at the depth that the index uses for this modality."""
    depth, steps = retriever.settings.reach(queries.modality).depth, list(_probes(retriever))
    points = []
    for number, probes in enumerate(steps, 1):
        points.append(measure(retriever, queries, Reach(probes=probes, depth=depth)))
        if progress is not None:
            progress(f"measuring {queries.modality} queries", number, len(steps))
    return points


def calibrate(
    retriever: LocalRetriever, queries: Queries, target: float, progress: Progress | None = None
) -> tuple[Measured, list[Measured]]:
    """The least reach whose recall is at least `target`, or the best there is; and all that was measured.

    First the fewest probes with the deepest ranking, then the least depth with these probes.
    """
    tried: list[Measured] = []
    steps = list(_probes(retriever))
    for number, probes in enumerate(steps, 1):
        tried.append(measure(retriever, queries, Reach(probes=probes, depth=DEPTHS[0])))
        if progress is not None:
            progress(f"tuning {queries.modality} queries", number, len(steps))
        if tried[-1].recall >= target:
            break
    chosen = next((one for one in tried if one.recall >= target), max(tried, key=lambda one: one.recall))
    for depth in DEPTHS[1:]:
        tried.append(measure(retriever, queries, Reach(probes=chosen.reach.probes, depth=depth)))
        if tried[-1].recall < min(target, chosen.recall):
            break
        chosen = tried[-1]
    return chosen, tried


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """How far texts lie from images: mean cosines between random images, random texts, and texts and random images."""

    image_image: float
    text_text: float
    text_image: float
    text_nearest: float
    image_nearest: float


def modality_gap(images: Queries, texts: Queries) -> Gap:
    """Of the two samples; `nearest` is the cosine with the nearest image of the index."""
    others = images.vectors
    return Gap(
        image_image=_mean_pair(others),
        text_text=_mean_pair(texts.vectors),
        text_image=float((texts.vectors @ others.T).mean()),
        text_nearest=float(texts.cosines[:, 0].mean()),
        image_nearest=float(images.cosines[:, 0].mean()),
    )


def _mean_pair(vectors: Float32[np.ndarray, "rows dim"]) -> float:
    """Mean cosine of two different rows."""
    count = len(vectors)
    total = float(np.square(vectors.astype(np.float64).sum(0)).sum())
    return (total - count) / max(count * (count - 1), 1)


def _probes(retriever: LocalRetriever) -> Iterator[int]:
    cells = retriever.plan().cells
    steps: Sequence[int] = [one for one in PROBES if one < cells]
    yield from steps
    if cells <= PROBES[-1]:
        yield max(cells, 1)
