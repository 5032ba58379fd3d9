"""What a table of queries does not show: opening cold, filters, the neighbors of every row (adding is in `adding`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vector_search import ours
from vector_search.adding import adding
from vector_search.data import Data, K, exact_nearest
from vector_search.measure import drop_from_page_cache, recall
from vector_search.registry import SAME_PROBES, SYSTEMS, served

NUM_ONLINE, NUM_CHECKED, ONLINE_BATCH = 4_096, 1_000, 1_024
NUM_FILTERED = 20
KEPT_SOURCE = 42
PAPER_CELLS, PROBES = 131_072, 20


def cold_open(data: Data, folder: Path) -> dict[str, Any]:
    """Seconds from opening the store to the first answer, imports apart: nothing in the page cache, then all of it."""
    start = time.perf_counter()
    for module in ("faiss", "knn_diffusion.retrieval.index"):
        import_module(module)
    found = {"import_seconds": time.perf_counter() - start}
    drop_from_page_cache(folder)
    for name in ("cold_seconds", "warm_seconds"):
        start = time.perf_counter()
        with served().retriever(data, folder) as (retriever, _):
            ours.nearest(retriever, SAME_PROBES)(data.timed[:1], K)
            found[name] = time.perf_counter() - start
    return found


def filtered(data: Data, folder: Path) -> dict[str, Any]:
    """Recall@10 and time of searches among the 1 % of the rows that one source has."""
    where, allowed = f"source = 'source-{KEPT_SOURCE:02d}'", np.arange(data.size) % ours.NUM_SOURCES == KEPT_SOURCE
    found: dict[str, Any] = {"kept_rows": int(allowed.sum())}
    with served().retriever(data, folder) as (retriever, _):
        search = ours.nearest(retriever, SAME_PROBES, where)
        for kind, queries in data.queries.items():
            truth = exact_nearest(data, queries, min(K, int(allowed.sum())), allowed)
            found[f"{kind}_recall"] = recall(search(queries, truth.shape[1]), truth)
        start, used = time.perf_counter(), time.process_time()
        for query in data.timed[:NUM_FILTERED]:
            search(query[None], truth.shape[1])
        found["ms_single"] = 1e3 * (time.perf_counter() - start) / NUM_FILTERED
        found["cpu_ms_single"] = 1e3 * (time.process_time() - used) / NUM_FILTERED
    return found


def self_neighbors(data: Data, folder: Path) -> dict[str, Any]:
    """The package's table of every row's neighbors against asking row by row: rows a CPU second, and recall."""
    rows = np.sort(np.random.default_rng(0).permutation(data.size)[:NUM_ONLINE])
    checked = rows[:NUM_CHECKED]
    truth = others(exact_nearest(data, data.vectors[checked], K + 1), checked)
    paper = SYSTEMS["paper"].open(data, folder.parent / "paper").search(SYSTEMS["paper"].settings[0])
    found: dict[str, Any] = {}
    with served().retriever(data, folder) as (retriever, store):
        retriever.prepare()
        online = {"paper": paper, "ours": ours.nearest(retriever, SAME_PROBES)}
        for name, search in online.items():
            used = time.process_time()
            parts = np.split(rows, range(ONLINE_BATCH, len(rows), ONLINE_BATCH))
            answers = np.concatenate([search(data.vectors[part], K + 1) for part in parts])
            found[f"{name}_online_rows_per_cpu_second"] = len(rows) / (time.process_time() - used)
            found[f"{name}_online_recall"] = recall(others(answers[: len(checked)], checked), truth)
        return found | _table(data, store, checked, truth)


def _table(
    data: Data, store: Any, checked: Int[np.ndarray, "rows"], truth: Int[np.ndarray, "rows k"]
) -> dict[str, Any]:
    """The package's table: as a whole, and without making its cells, as online search is timed without its index."""
    joining: list[float] = []

    def progress(doing: str, done: int, of: int) -> None:
        if doing == "finding neighbors" and not joining:
            joining.append(time.process_time())

    start, used = time.perf_counter(), time.process_time()
    table = ours.self_neighbors(store, K, progress)
    ended = time.process_time()
    return {
        "table_seconds": time.perf_counter() - start,
        "table_rows_per_cpu_second": data.size / (ended - joining[0]),
        "table_rows_per_cpu_second_with_cells": data.size / (ended - used),
        "table_recall": recall(np.asarray(table)[checked], truth),
    }


def many_cells(data: Data, folder: Path) -> dict[str, Any]:
    """Choosing 20 cells of as many as 400 million images take (A.3), the data's own vectors in the centroids' place."""
    from knn_diffusion.retrieval.cells import coarse_index

    count = min(PAPER_CELLS, data.size // 2)
    centroids = np.ascontiguousarray(data.vectors[:count], np.float32)
    coarse = coarse_index(centroids)
    found: dict[str, Any] = {"cells": count}
    for kind, queries in data.queries.items():
        right = np.argsort(-(queries @ centroids.T), axis=1)[:, :PROBES]
        found[f"{kind}_right_cells"] = recall(coarse.search(queries, PROBES)[1], right)
    used = time.process_time()
    for query in data.timed:
        coarse.search(query[None], PROBES)
    return found | {"cpu_ms_single": 1e3 * (time.process_time() - used) / len(data.timed)}


def others(found: Int[np.ndarray, "rows more"], own: Int[np.ndarray, "rows"]) -> Int[np.ndarray, "rows k"]:
    """The first K neighbors of each row without the row itself."""
    return np.array([[row for row in line if row != self][:K] for line, self in zip(found, own, strict=True)])


SCENARIOS: dict[str, Callable[[Data, Path], dict[str, Any]]] = {
    "self-neighbors": self_neighbors,
    "adding": lambda data, folder: adding(data, folder, same_process=False),
    "adding-same-process": lambda data, folder: adding(data, folder, same_process=True),
    "cold-open": cold_open,
    "filter": filtered,
    "many-cells": many_cells,
}
"""Each gets the folder that SERVED was built in."""
NEEDS = dict.fromkeys(SCENARIOS, ("fast-scan",)) | {"self-neighbors": ("fast-scan", "paper")}
"""Systems that must be built before."""
