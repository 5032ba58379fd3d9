"""Neighbor lists of very many images at once: every cell is joined with its own and its nearest cells.

The paper's words (Sec. 3.2, A.3) taken literally: an image's neighbors are looked for in its own cell and 19 others. Done
for a whole cell at a time that is one matrix product, with exact cosines, instead of one search for each image.

    embeddings, laid out cell by cell     one copy, in memory or in a temporary file
    for each cell: its rows · (rows of its own and 19 nearest cells)ᵀ ─▶ best candidates ─▶ A.4 ─▶ k neighbors

The table is written as it comes, so an interrupted join goes on with the next cell.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int
from torch import Tensor

from knn_diffusion.checkpoint import write_json
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.cells import nearest_centroids, spherical_centroids
from knn_diffusion.retrieval.engines import unit_vectors
from knn_diffusion.retrieval.plan import IndexConfig, training_points
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

JOINED_CELLS = 20
"""The own cell and 19 others, A.3."""
BLOCK_ROWS = 65_536
MEMORY_BYTES = 2**32
"""Up to so many bytes the embeddings are laid out in memory, beyond in a temporary file."""
NOTED_EVERY = 64
"""Cells after which the progress of a join is noted."""

Choose = Callable[[Tensor, Int[np.ndarray, "queries"], Int[np.ndarray, "queries found"]], np.ndarray]
"""(unit vectors, places of the images themselves, candidate places best first) -> k places each, -1 where too few are left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellLayout:
    """Live rows laid out cell by cell.

    order       places of the live rows, those of cell 0 first
    bounds      where each cell begins in `order`, and the end
    vectors     embeddings in that order
    neighbors   for each cell itself and the cells nearest to it
    """

    order: Int[np.ndarray, "items"]
    bounds: Int[np.ndarray, "bounds"]
    vectors: Float16[np.ndarray, "items dim"]
    neighbors: Int[np.ndarray, "cells joined"]

    def members(self, cell: int) -> Int[np.ndarray, "members"]:
        """Positions of a cell's rows in the layout."""
        return np.arange(self.bounds[cell], self.bounds[cell + 1])

    def candidates(self, cell: int) -> Int[np.ndarray, "candidates"]:
        """Positions of all rows that a cell is joined with."""
        return np.concatenate([self.members(int(one)) for one in self.neighbors[cell]])


@dataclass(kw_only=True, slots=True)
class UnfinishedTable:
    """A table that is written as it comes, beside the file that it becomes, with a note of how far it has come."""

    output: Path
    table: Int[np.memmap, "items k"]
    made_from: str
    cells: int = 0

    @classmethod
    def open(cls, output: Path, shape: tuple[int, int], kind: np.dtype[Any], made_from: str) -> UnfinishedTable:
        """The table begun there before if it was made from the same, otherwise a new one."""
        part, notes = _beside(output)
        try:
            noted = json.loads(notes.read_text(encoding="utf-8"))
            table = np.lib.format.open_memmap(part, "r+")
            if noted["made_from"] == made_from and table.shape == shape and table.dtype == kind:
                return cls(output=output, table=table, made_from=made_from, cells=noted["cells"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        table = np.lib.format.open_memmap(part, "w+", kind, shape)
        return cls(output=output, table=table, made_from=made_from)

    def note(self, cells: int) -> None:
        """So many cells are in the file."""
        self.table.flush()
        write_json(_beside(self.output)[1], {"cells": cells, "made_from": self.made_from})

    def finish(self) -> Int[np.ndarray, "items k"]:
        """Put the whole table in its place."""
        self.table.flush()
        part, notes = _beside(self.output)
        part.replace(self.output)
        notes.unlink(missing_ok=True)
        return self.table


def _beside(output: Path) -> tuple[Path, Path]:
    return output.with_name(f".{output.name}.part"), output.with_name(f".{output.name}.json")


def lay_out(store: Store, snapshot: Snapshot, folder: Path | None, progress: Progress | None) -> CellLayout:
    """Put every live row into its cell. Deterministic for the same store.

    Args:
        folder: for the temporary copy, when it is too large for memory; None is the system's.
    """
    rows, dim = snapshot.live_rows, store.encoder.dim
    cells = IndexConfig().num_cells(len(rows))
    draw = np.sort(np.random.default_rng(0).choice(rows, training_points(len(rows), dim, cells), replace=False))
    centroids = spherical_centroids(unit_vectors(store, draw, snapshot), cells)
    owner = np.empty(len(rows), np.int32)
    for start in range(0, len(rows), BLOCK_ROWS):
        some = slice(start, start + BLOCK_ROWS)
        owner[some] = nearest_centroids(centroids, unit_vectors(store, rows[some], snapshot), 1)[:, 0]
        if progress is not None:
            progress("putting images into cells", min(start + BLOCK_ROWS, len(rows)), len(rows))
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(cells + 1))
    vectors = _room_for(len(rows), dim, folder)
    for start in range(0, len(rows), BLOCK_ROWS):
        some = slice(start, start + BLOCK_ROWS)
        vectors[some] = store.embeddings(rows[order[some]], snapshot)
    return CellLayout(order=order, bounds=bounds, vectors=vectors, neighbors=joined_cells(centroids))


def joined_cells(centroids: Float32[np.ndarray, "cells dim"]) -> Int[np.ndarray, "cells joined"]:
    """The cells that each one is joined with: itself, then the others that are nearest, even where centroids are equal."""
    count, own = min(JOINED_CELLS, len(centroids)), np.arange(len(centroids))[:, None]
    nearest = np.concatenate([own, nearest_centroids(centroids, centroids, count)], 1)
    again = nearest == own
    again[:, 0] = False
    return np.take_along_axis(nearest, np.argsort(again, axis=1, kind="stable")[:, :count], 1)


def join_cells(
    layout: CellLayout,
    table: Int[np.ndarray, "items k"],
    fetch: int,
    choose: Choose,
    device: torch.device,
    *,
    kept: UnfinishedTable | None = None,
    progress: Progress | None = None,
) -> None:
    """Fill the table with places of each image's neighbors.

    Args:
        fetch: candidates of each image that `choose` sees at first; four times as many where too few remain.
        kept: where to note how far the join has come, and where to go on.
    """
    for cell in range(kept.cells if kept is not None else 0, len(layout.neighbors)):
        own = layout.members(cell)
        if len(own):
            _join(layout, table, cell, fetch, choose, device)
        if kept is not None and (cell + 1) % NOTED_EVERY == 0:
            kept.note(cell + 1)
        if progress is not None:
            progress("finding neighbors", int(layout.bounds[cell + 1]), len(layout.order))


def _join(
    layout: CellLayout,
    table: Int[np.ndarray, "items k"],
    cell: int,
    fetch: int,
    choose: Choose,
    device: torch.device,
) -> None:
    own, others = layout.members(cell), layout.candidates(cell)
    many = unit_tensor(layout.vectors[others], device)
    queries = many[: len(own)]  # a cell is joined with itself first
    pending = np.arange(len(own))
    scores = queries @ many.T
    while len(pending):
        fetch = min(fetch, len(others))
        top = scores[torch.from_numpy(pending).to(device)].topk(fetch, dim=1).indices.cpu().numpy()
        places = layout.order[own[pending]]
        table[places] = choose(queries[torch.from_numpy(pending).to(device)], places, layout.order[others[top]])
        if fetch == len(others):
            break
        pending, fetch = pending[table[places, -1] < 0], 4 * fetch


def unit_tensor(vectors: Float16[np.ndarray, "rows dim"], device: torch.device) -> Float32[Tensor, "rows dim"]:
    """The directions of stored vectors, on the device."""
    return torch.nn.functional.normalize(torch.from_numpy(vectors).to(device).float(), dim=1)


def _room_for(count: int, dim: int, folder: Path | None) -> Float16[np.ndarray, "items dim"]:
    if 2 * count * dim <= MEMORY_BYTES:
        return np.empty((count, dim), np.float16)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".cells-") as file:  # deleted, and there while it is mapped
        return np.memmap(file, np.float16, "w+", shape=(count, dim)).view(np.ndarray)
