"""A search index as one file that every faiss reads; entry i of it is vector i of the exported files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from knn_diffusion.checkpoint import write_json
from knn_diffusion.errors import KnnDiffusionError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.cell_engine import CellEngine
from knn_diffusion.retrieval.cells import add_rows, drop_others, faiss_module, take_rows
from knn_diffusion.retrieval.engines import unit_vectors
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.plan import BITS_PER_CODE, IndexConfig, Plan, num_codes
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

INDEX_FILE, FACTS_FILE = "image.index", "image.json"
"""As clip-retrieval names them."""
ADD_ROWS = 16_384


def write_faiss(
    store: Store, snapshot: Snapshot, settings: IndexConfig, folder: Path, progress: Progress | None = None
) -> str:
    """Write `image.index` and, as autofaiss does, facts about it in `image.json`; says which kind it is.

    Raises: KnnDiffusionError when the disk is full.
    """
    index, key = faiss_index(store, snapshot, settings, progress)
    path = folder / INDEX_FILE
    try:
        faiss_module().write_index(index, str(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise KnnDiffusionError(f"{path} could not be written ({reason}): free space; nothing was changed") from None
    size = path.stat().st_size
    facts = {
        "index_key": key,
        "index_param": "" if key == "Flat" else f"nprobe={settings.text.probes}",
        "metric_type": "ip",
        "nb vectors": index.ntotal,
        "vectors dimension": index.d,
        "size in bytes": size,
        "compression ratio": 4 * index.ntotal * index.d / size,
    }
    write_json(folder / FACTS_FILE, facts)
    return key


def faiss_index(
    store: Store, snapshot: Snapshot, settings: IndexConfig, progress: Progress | None = None
) -> tuple[Any, str]:
    """A faiss index of the images that are not removed, numbered in their order, and its name in faiss's words.

    Exact where the store is searched exactly; else the cells that searches use, set to look into as many as for a text.
    """
    plan = LocalRetriever(store, settings).plan()
    if plan.layout == "exact":
        flat = faiss_module().IndexFlatIP(store.encoder.dim)
        rows = snapshot.live_rows
        for start in range(0, len(rows), ADD_ROWS):
            flat.add(unit_vectors(store, rows[start : start + ADD_ROWS], snapshot))
        return flat, "Flat"
    index = _cells_of_all(store, snapshot, plan, progress)
    faiss_module().extract_index_ivf(index).nprobe = min(settings.text.probes, plan.cells)
    return index, _key(plan, store.encoder.dim)


def _cells_of_all(store: Store, snapshot: Snapshot, plan: Plan, progress: Progress | None) -> Any:
    """The derived index as one piece of our own, with the newest rows in it and the removed ones out of it."""
    engine = CellEngine(store, plan, progress=progress)
    index = engine._parts[0].index
    for part in engine._parts[1:]:
        take_rows(index, part.index)
    for first in range(engine.first_later_row(snapshot), snapshot.num_rows, ADD_ROWS):
        rows = np.arange(first, min(first + ADD_ROWS, snapshot.num_rows))
        add_rows(index, unit_vectors(store, rows, snapshot), snapshot.records.of_rows(rows))
    alive = snapshot.records.spread(snapshot.alive)
    if not alive.all() or index.ntotal > len(alive):
        _renumber(index, alive)
    return index


def _renumber(index: Any, alive: Bool[np.ndarray, "records"]) -> None:
    """Take out what was removed, and what another process appended meanwhile, and close the gaps in the numbers."""
    drop_others(index, alive)
    faiss, places = faiss_module(), np.cumsum(alive) - 1
    lists = faiss.extract_index_ivf(index).invlists
    for cell in range(lists.nlist):
        if size := lists.list_size(cell):
            ids = faiss.rev_swig_ptr(lists.get_ids(cell), size)
            ids[:] = places[ids]


def _key(plan: Plan, dim: int) -> str:
    if plan.layout == "sq8":
        return f"IVF{plan.cells},SQ8"
    codes = num_codes(plan.layout, dim)
    fast = "" if plan.layout == "paper" else "fs"
    return f"OPQ{codes},IVF{plan.cells},PQ{codes}x{BITS_PER_CODE[plan.layout]}{fast}"
