"""Drift: how well cells and codes still fit, when images came that were not there when they were trained.

An image far from the centre of its cell lies near other cells' too, and its neighbors are spread over more cells than a
query looks into. So the distance to the centre of the own cell, of later images against earlier ones, tells of lost recall
without a search. How much is lost, only recall itself says (`tuning.py`). Codes suffer too, but what they lose the ranking
by stored embeddings makes good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from knn_diffusion.retrieval.cells import cell_distances
from knn_diffusion.retrieval.engines import unit_vectors
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

SAMPLE, SAMPLED_SEGMENTS = 1000, 8
"""Images measured of each kind, and files of vectors that they are taken from: a file is verified when it is first read."""
MUCH_FARTHER, MANY_LATER = 1.15, 0.02
"""Later images so many times as far from their cells, and their share, from which on training again is worth it.

More of the same lies 1.07 times as far, as cells fit best what they were trained on; with a tenth of unseen topics among
the later images it is 1.19 and one neighbor in twenty of theirs is missed, see docs/large-indexes.md."""
MANY_CELLS_MORE = 4
"""So many times as many cells would fit the images there are now: those in use take that much longer to look into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """What changed since cells and codes were trained.

    count, later      images there are, and those of them that came after the training
    cells, new_cells  in use, and of an index trained now
    distances         1 - cosine with the centre of the own cell, on average over images of before and later ones;
                      none of before where all that the cells were trained on were removed
    """

    count: int
    later: int
    cells: int
    new_cells: int
    earlier_distance: float | None
    later_distance: float

    @property
    def share(self) -> float:
        """The part of the images that came later, 0 to 1."""
        return self.later / self.count

    @property
    def farther(self) -> float:
        """How many times as far from their cells later images lie as earlier ones; infinite where none of those is left."""
        return math.inf if self.earlier_distance is None else self.later_distance / max(self.earlier_distance, 1e-9)

    @property
    def worth_training(self) -> bool:
        """Whether enough images lie far enough off, or far more cells would fit."""
        return (
            self.share >= MANY_LATER and self.farther >= MUCH_FARTHER
        ) or self.new_cells >= MANY_CELLS_MORE * self.cells

    def __str__(self) -> str:
        """In one line."""
        more = f"; trained now, there would be {self.new_cells:,}" if self.new_cells != self.cells else ""
        if self.earlier_distance is None:
            return f"none of the images that the {self.cells:,} cells were trained on is left{more}"
        return (
            f"{self.later:,} of {self.count:,} images came after the {self.cells:,} cells were trained; they lie "
            f"{self.farther:.1f} times as far from the centre of their cell as those before{more}"
        )


def drift(retriever: LocalRetriever, sample: int = SAMPLE) -> Drift | None:
    """How well cells and codes fit the images of later, without a search; None where there are no cells, or no such images."""
    if (found := retriever.trained()) is None:
        return None
    trained, num_records = found
    snapshot = retriever.store.snapshot()
    first = snapshot.records.row_from(num_records)
    earlier, later = int(snapshot.alive[:first].sum()), int(snapshot.alive[first:].sum())
    if not later:
        return None
    before = _distance(trained, _sample(retriever.store, snapshot, 0, first, sample)) if earlier else None
    return Drift(
        count=earlier + later,
        later=later,
        cells=retriever.plan().cells,
        new_cells=retriever.new_plan().cells,
        earlier_distance=before,
        later_distance=_distance(trained, _sample(retriever.store, snapshot, first, snapshot.num_rows, sample)),
    )


def _sample(store: Store, snapshot: Snapshot, start: int, end: int, count: int) -> Float32[np.ndarray, "rows dim"]:
    """Live rows from `start` to `end`, of a few segments."""
    draw = np.random.default_rng(0)
    bounds = [(max(one.first_row, start), min(one.first_row + one.num_rows, end)) for one in snapshot.segments]
    alive = [first + np.flatnonzero(snapshot.alive[first:last]) for first, last in bounds if first < last]
    alive = [rows for rows in alive if len(rows)]
    chosen = np.concatenate([alive[one] for one in draw.permutation(len(alive))[:SAMPLED_SEGMENTS]])
    return unit_vectors(store, np.sort(draw.choice(chosen, min(count, len(chosen)), replace=False)), snapshot)


def _distance(trained: Any, vectors: Float32[np.ndarray, "rows dim"]) -> float:
    return float(cell_distances(trained, vectors).mean())
