"""This package as a system under test: a store filled once, and one search index for each layout over the same rows.

Everything is done through `Store` and `LocalRetriever`; only this file knows their names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from vector_search.data import Data
from vector_search.measure import Search, bytes_below, drop_from_page_cache
from vector_search.systems import Opened, Setting, Sizes, fixed_bytes

SEGMENT_ROWS = 65_536
NUM_SOURCES = 100
"""Every vector has one of so many sources, so that a filter on one keeps 1 %."""
STORE = "store"


def reach(probes: int, depth: int) -> Setting:
    """A setting: cells looked into, and candidates compared again for each neighbor wanted."""
    label = f"{probes} probes" if depth == 1 else f"{probes} probes, {depth}K compared again"
    return Setting(label=label, options={"probes": probes, "depth": depth})


class Ours:
    """One layout of the package's index.

    Args:
        rows: where the compared embeddings lie: "mapped" from the store's files and warm, "ram", or "cold" on the disk.
        codes_per_cell: instead of the package's own number of cells.
    """

    def __init__(
        self,
        name: str,
        layout: str,
        settings: tuple[Setting, ...],
        *,
        rows: str = "mapped",
        codes_per_cell: int | None = None,
        built: str | None = None,
    ) -> None:
        self.name, self.built, self.settings = name, built or name, settings
        self.layout, self._rows, self._codes_per_cell = layout, rows, codes_per_cell

    def missing(self) -> str | None:
        """Never; but imports what it needs, so that this is not measured."""
        import_module("knn_diffusion.retrieval.index")
        return None

    def build(self, data: Data, folder: Path) -> None:
        """The shared store under another name, and this layout's index beside it."""
        link_store(shared_store(data), folder / STORE)
        with self.retriever(data, folder) as (retriever, _):
            retriever.prepare()

    def retriever(self, data: Data, folder: Path) -> Retriever:
        """Retriever and store in a `with` block."""
        cells = self._codes_per_cell and max(1, data.size // self._codes_per_cell)
        settings = {"layout": self.layout, "cells": cells, "rows_in_memory": self._rows == "ram"}
        return Retriever(folder / STORE, settings)

    def open(self, data: Data, folder: Path) -> Opened:
        """Ready to search; the store stays open as long as the process."""
        opened = [self._opened(data, folder)]

        def search(setting: Setting) -> Search:
            def ask(queries: Float32[np.ndarray, "queries dim"], k: int) -> Int[np.ndarray, "queries k"]:
                return nearest(opened[0], setting)(queries, k)

            return ask

        def make_cold() -> None:
            opened.pop().store.close()  # pages that somebody maps stay in memory
            drop_from_page_cache(folder / STORE / "segments")
            opened.append(self._opened(data, folder))

        return Opened(search=search, make_cold=make_cold if self._rows == "cold" else None)

    def _opened(self, data: Data, folder: Path) -> Any:
        retriever, store = self.retriever(data, folder).__enter__()
        retriever.prepare()
        if self._rows == "mapped":
            read_all(store, data.size)
        return retriever

    def sizes(self, data: Data, folder: Path) -> Sizes:
        """The index is everything in the store's cache folder; the rest is the store."""
        import faiss

        files = sorted((folder / STORE / "cache").rglob("*.faiss"))
        fixed = sum(fixed_bytes(faiss.read_index(str(path))) for path in files)
        return Sizes(index=bytes_below(folder / STORE / "cache"), fixed=fixed, disk=bytes_below(folder / STORE))


class Retriever:
    """A `with` block: opens a store and a retriever over it, and closes the store."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder, self._settings = folder, settings

    def __enter__(self) -> tuple[Any, Any]:
        from knn_diffusion.retrieval.index import IndexConfig, LocalRetriever
        from knn_diffusion.retrieval.store import Store

        self._store = Store.open(self._folder)
        return LocalRetriever(self._store, IndexConfig(**self._settings)), self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()


def read_all(store: Any, size: int) -> None:
    """Bring all rows into memory and have them verified, as a server has that runs for a while."""
    for start in range(0, size, SEGMENT_ROWS):
        store.embeddings(np.arange(start, min(start + SEGMENT_ROWS, size)))


def shared_store(data: Data) -> Path:
    """The store of all vectors, in their order; made when first asked for."""
    from knn_diffusion.retrieval.store import EncoderIdentity, Store

    folder = data.folder / "store"
    if folder.exists():
        return folder
    unfinished = folder.with_name("store.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    encoder = EncoderIdentity(name="clip-like", fingerprint=str(data.about["origin"]), dim=data.dim)
    with Store.create(unfinished, encoder) as store:
        for start, block in data.blocks(SEGMENT_ROWS):
            store.append(items(start, len(block)), block)
    os.replace(unfinished, folder)
    return folder


def link_store(folder: Path, copy: Path) -> None:
    """A second store with the same segments, which are never written again, and a database of its own."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, copy_function=_link_segments)


def items(first_row: int, count: int) -> list[Any]:
    """Items whose id is their row."""
    from knn_diffusion.retrieval.store import Item

    return [
        Item(
            id=str(row),
            source=f"source-{row % NUM_SOURCES:02d}",
            key=str(row),
            content=hashlib.sha256(str(row).encode()).hexdigest(),
        )
        for row in range(first_row, first_row + count)
    ]


def training() -> dict[str, str]:
    """The package's own training budget."""
    from knn_diffusion.retrieval import cells, plan

    return {
        "cells": f"spherical k-means, {plan.KMEANS_ITERATIONS} iterations, {plan.POINTS_PER_CELL} vectors a cell",
        "rotation": f"OPQ, {cells.ROTATION_ITERATIONS} iterations, {cells.ROTATION_SAMPLE} vectors",
        "codes": f"k-means, faiss' 25 iterations and 256 vectors a centroid, of {cells.CODE_SAMPLE}",
    }


def nearest(retriever: Any, setting: Setting, where: str | None = None) -> Search:
    """The search function of one setting, under a filter or none."""
    from knn_diffusion.retrieval.plan import Reach

    reach = Reach(probes=setting.options["probes"], depth=setting.options["depth"])
    return lambda queries, k: retriever.nearest(queries, k, reach=reach, where=where)[0]


def append_batches(store: Any, vectors: Float32[np.ndarray, "rows dim"], first_row: int, rows: int) -> Iterator[int]:
    """Append in batches of so many rows; the last row of each, after it is acknowledged."""
    for start in range(0, len(vectors), rows):
        block = vectors[start : start + rows]
        store.append(items(first_row + start, len(block)), block)
        yield first_row + start + len(block) - 1


def _link_segments(source: str, target: str) -> None:
    if source.endswith(".npy"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def self_neighbors(store: Any, k: int, progress: Callable[[str, int, int], None]) -> Int[np.ndarray, "rows k"]:
    """The package's table of every row's nearest others; of copies too."""
    from knn_diffusion.retrieval.dedup import OFF
    from knn_diffusion.retrieval.neighbors import self_neighbors as table

    return table(store, k, OFF, progress=progress)
