"""What every system under test offers, exact search, and the paper's configuration by plain faiss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32

from vector_search.data import EXACT_ROWS, Data
from vector_search.measure import Search


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to query a system: how it is called in the report, and what it means."""

    label: str
    options: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A built system, ready to search."""

    search: Callable[[Setting], Search]
    """The search function of one setting."""
    make_cold: Callable[[], None] | None = None
    """Send everything that may lie on the disk back to it; None for systems that are measured warm only."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a built system.

    index   of the search index, whole: with centroids, rotation and codebooks, as it is written to a file
    fixed   of those the part that does not grow with the number of vectors
    disk    everything in the folder, embeddings included where the system keeps them
    """

    index: int
    fixed: int
    disk: int


class System(Protocol):
    """One line of the table's first column."""

    name: str
    built: str
    """Name of the folder it is built in; systems with the same name share it."""
    settings: tuple[Setting, ...]

    def missing(self) -> str | None:
        """Why it cannot be measured here, None when it can; imports what it needs, so that this is not measured."""

    def build(self, data: Data, folder: Path) -> None:
        """Make everything that searching needs in the empty folder."""

    def open(self, data: Data, folder: Path) -> Opened:
        """Get ready to search, in a fresh process."""

    def sizes(self, data: Data, folder: Path) -> Sizes:
        """Bytes, after building."""


def num_cells(size: int) -> int:
    """Cells for that many vectors, the same for every system: 4·sqrt(size), a power of two."""
    return int(2 ** max(4, round(np.log2(4 * size**0.5))))


class Exact:
    """Every vector compared with the query, by one matrix product: the truth, and what an index must be faster than."""

    name = built = "exact"
    settings = (Setting(label="all vectors"),)

    def missing(self) -> str | None:
        """Never."""
        return None

    def build(self, data: Data, folder: Path) -> None:
        """Nothing to build."""

    def open(self, data: Data, folder: Path) -> Opened:
        """All vectors in memory, in float32."""
        import faiss

        index = faiss.IndexFlatIP(data.dim)
        for _, block in data.blocks():
            index.add(block)
        return Opened(search=lambda setting: lambda queries, k: index.search(queries, k)[1])

    def sizes(self, data: Data, folder: Path) -> Sizes:
        """The vectors themselves."""
        return Sizes(index=4 * data.dim * data.size, fixed=0, disk=4 * data.dim * data.size)


CELL_ITERATIONS, POINTS_PER_CELL = 10, 64
ROTATION_ITERATIONS, ROTATION_FIRST_ITERATIONS, ROTATION_POINTS = 8, 10, 16_384
CODE_ITERATIONS, CODE_POINTS = 25, 65_536
PAPER_TRAINING = {
    "cells": f"spherical k-means, {CELL_ITERATIONS} iterations, {POINTS_PER_CELL} vectors a cell",
    "rotation": f"OPQ for these codes, {ROTATION_ITERATIONS} iterations, {ROTATION_POINTS} vectors",
    "codes": f"k-means, {CODE_ITERATIONS} iterations, {CODE_POINTS} vectors",
}
"""No part is trained on less than the package trains its own on (see `ours.training`)."""


class Paper:
    """A.3 by plain faiss: OPQ, an inverted file, and one byte for two dimensions; 20 cells are looked into."""

    def __init__(
        self, name: str = "paper", codes_per_cell: int | None = None, probes: tuple[int, ...] = (20, 64, 128)
    ) -> None:
        self.name = self.built = name
        self._codes_per_cell = codes_per_cell
        self.settings = tuple(Setting(label=f"{count} probes", options={"probes": count}) for count in probes)

    def missing(self) -> str | None:
        """Never: faiss comes with the package."""
        return None

    def build(self, data: Data, folder: Path) -> None:
        """Train on samples, then add all vectors a block at a time."""
        import faiss

        parts = max(data.dim // 2, 1)
        cells = max(1, data.size // self._codes_per_cell) if self._codes_per_cell else num_cells(data.size)
        rotation = faiss.OPQMatrix(data.dim, parts)
        rotation.niter, rotation.niter_pq_0 = ROTATION_ITERATIONS, ROTATION_FIRST_ITERATIONS
        rotation.max_train_points = ROTATION_POINTS
        rotation.train(data.sample(ROTATION_POINTS))
        centroids = rotation.apply(_centroids(data, cells))
        inverted = faiss.IndexIVFPQ(faiss.IndexFlatIP(data.dim), data.dim, cells, parts, 8, faiss.METRIC_INNER_PRODUCT)
        inverted.quantizer.add(centroids)
        inverted.pq.cp.niter, inverted.pq.cp.min_points_per_centroid = CODE_ITERATIONS, 1
        inverted.train(rotation.apply(data.sample(CODE_POINTS)))
        index = faiss.IndexPreTransform(rotation, inverted)
        for _, block in data.blocks():
            index.add(block)
        faiss.write_index(index, str(folder / "paper.faiss"))

    def open(self, data: Data, folder: Path) -> Opened:
        """The index in memory; a search never changes it."""
        import faiss

        index = faiss.read_index(str(folder / "paper.faiss"))

        def searching(setting: Setting) -> Search:
            cells = faiss.SearchParametersIVF(nprobe=setting.options["probes"])
            parameters = faiss.SearchParametersPreTransform(index_params=cells)
            return lambda queries, k: index.search(np.ascontiguousarray(queries), k, params=parameters)[1]

        return Opened(search=searching)

    def sizes(self, data: Data, folder: Path) -> Sizes:
        """Of the one file; the embeddings that the generator needs beside it are not counted."""
        import faiss

        path = folder / "paper.faiss"
        size = path.stat().st_size
        return Sizes(index=size, fixed=fixed_bytes(faiss.read_index(str(path))), disk=size)


def fixed_bytes(index: Any) -> int:
    """What a faiss index holds beside its vectors: centroids, rotation, codebooks. Empties the index."""
    import faiss

    index.reset()
    return int(faiss.serialize_index(index).nbytes)


def _centroids(data: Data, cells: int) -> Float32[np.ndarray, "cells dim"]:
    import faiss

    kmeans = faiss.Kmeans(
        data.dim,
        cells,
        niter=CELL_ITERATIONS,
        spherical=True,
        seed=1,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CELL,
    )
    kmeans.train(data.sample(max(POINTS_PER_CELL * cells, EXACT_ROWS)))
    return kmeans.centroids
