"""How an index of a given size is searched: the layout, what it takes, and how far each query looks.

A layout is chosen from the number of images and the memory it may take. Up to a hundred thousand images every one is
compared. Beyond, images lie in cells (paper A.3) as short codes; a query looks into some cells, and the best candidates
by their codes are compared again with the embeddings in the store, which lie there anyway as the neighbors in y.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import numpy as np

from knn_diffusion.config import config, require
from knn_diffusion.errors import UsageError

Layout = Literal["exact", "sq8", "fast-scan", "fast-scan-small", "paper"]
Modality = Literal["image", "text"]

CELL_LAYOUTS: tuple[Layout, ...] = ("fast-scan", "fast-scan-small", "paper", "sq8")
DIMS_PER_CODE = {"fast-scan": 2, "fast-scan-small": 4, "paper": 2}
BITS_PER_CODE = {"fast-scan": 4, "fast-scan-small": 4, "paper": 8}
ID_BYTES = 8
KMEANS_ITERATIONS = 6
POINTS_PER_CELL = 50
"""Training vectors for each cell."""
MAX_TRAINING_BYTES = 2**31
TRAINING_SPEED = 4e10
"""Multiplications a second of k-means on two cores; only for the estimate of time."""
ADDING_SPEED = 15_000
"""Rows a second that two cores put into cells; only for the estimate of time."""


@config
class Reach:
    """How far a query looks.

    probes   cells looked into; the paper: the image's own and 19 others
    depth    candidates for each neighbor wanted, compared again by their stored embeddings; 1 believes the codes
    """

    probes: int = 20
    depth: int = 10

    def __post_init__(self) -> None:
        require(self.probes >= 1, "probes", self.probes, "at least 1")
        require(self.depth >= 1, "depth", self.depth, "at least 1")

    def times(self, effort: int) -> Reach:
        """So many times as far."""
        return Reach(probes=self.probes * effort, depth=self.depth)


@config
class IndexConfig:
    """How an index searches.

    layout        exact compares every image; sq8, fast-scan and fast-scan-small keep one byte, two bits and one bit a
                  dimension in memory; paper is A.3's, one byte for two dimensions; auto chooses by size and memory
    rows_in_memory  hold the embeddings that candidates are compared by in memory (two bytes a dimension) instead of
                  mapping them from the disk
    exact_below   up to this many images auto compares every one
    memory_bytes  what auto may take; None: half of the machine's memory
    cells         number of cells; None: 4·sqrt(images), a power of two, at least 16
    image, text   how far queries look: texts lie apart from images in H, and their neighbors are spread over more cells
    """

    layout: Literal["auto"] | Layout = "auto"
    rows_in_memory: bool = False
    exact_below: int = 100_000
    memory_bytes: int | None = None
    cells: int | None = None
    image: Reach = Reach(probes=20, depth=6)
    text: Reach = Reach(probes=112, depth=20)

    def __post_init__(self) -> None:
        known = ("auto", "exact", *CELL_LAYOUTS)
        require(self.layout in known, "layout", self.layout, f"one of {', '.join(known)}")
        require(self.exact_below >= 0, "exact_below", self.exact_below, "at least 0")
        memory = self.memory_bytes
        require(memory is None or memory >= 1, "memory_bytes", memory, "at least 1 or None")
        require(self.cells is None or self.cells >= 1, "cells", self.cells, "at least 1 or None")

    def reach(self, modality: Modality) -> Reach:
        """How far a query of this kind looks."""
        return self.text if modality == "text" else self.image

    def num_cells(self, count: int) -> int:
        """Cells for `count` images, never more than there are images."""
        return min(self.cells or 2 ** max(4, round(np.log2(4 * max(count, 1) ** 0.5))), max(count, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How an index of this size is searched, and what that takes beside the store.

    cells          0 where every image is compared
    memory_bytes   while searching
    disk_bytes     of what is kept in the store's cache folder
    build_seconds  a rough guess for two cores
    """

    layout: Layout
    count: int
    cells: int
    memory_bytes: int
    disk_bytes: int
    build_seconds: float
    reason: str

    @property
    def engine(self) -> str:
        """The plan in a few words."""
        return self.layout if self.layout == "exact" else f"{self.layout}, {self.cells:,} cells"

    def __str__(self) -> str:
        """The plan in one line."""
        takes = f"{self.memory_bytes / 2**20:,.0f} MiB of memory"
        if self.layout != "exact":
            takes += (
                f", {self.disk_bytes / 2**20:,.0f} MiB of disk, about {self.build_seconds / 60:,.1f} minutes to build"
            )
        return f"{self.count:,} images: search is {self.engine} ({self.reason}), {takes}"


def plan_for(count: int, dim: int, settings: IndexConfig) -> Plan:
    """The layout for so many images of `dim` numbers.

    Raises: UsageError when no layout fits the memory.
    """
    layout, reason = _choose(count, dim, settings)
    if layout == "exact":
        memory = 4 * dim * count
        return Plan(
            layout=layout, count=count, cells=0, memory_bytes=memory, disk_bytes=0, build_seconds=0.0, reason=reason
        )
    cells = settings.num_cells(count)
    memory = _memory(layout, count, dim, cells)
    disk = memory
    if settings.rows_in_memory:
        memory += 2 * dim * count
    points = training_points(count, dim, cells)
    seconds = KMEANS_ITERATIONS * points * cells * dim / TRAINING_SPEED + count / ADDING_SPEED
    return Plan(
        layout=layout,
        count=count,
        cells=cells,
        memory_bytes=memory,
        disk_bytes=disk,
        build_seconds=seconds,
        reason=reason,
    )


def training_points(count: int, dim: int, cells: int) -> int:
    """Vectors that cells and codes are trained on, in bounded memory."""
    return min(count, max(POINTS_PER_CELL * cells, 65_536), MAX_TRAINING_BYTES // (4 * dim))


def code_bytes(layout: Layout, dim: int) -> int:
    """Bytes of one image's code."""
    if layout == "sq8":
        return dim
    return -(-num_codes(layout, dim) * BITS_PER_CODE[layout] // 8)


def num_codes(layout: Layout, dim: int) -> int:
    """Sub-quantizers of a product quantizer: as many as the layout wants, or the next fewer that divide the width."""
    wanted = max(dim // DIMS_PER_CODE[layout], 1)
    return max(parts for parts in range(1, wanted + 1) if dim % parts == 0)


def _choose(count: int, dim: int, settings: IndexConfig) -> tuple[Layout, str]:
    if settings.layout != "auto":
        return settings.layout, "asked for"
    if count <= settings.exact_below:
        return "exact", f"{count:,} images are at most {settings.exact_below:,}"
    budget = settings.memory_bytes or _machine_memory() // 2
    cells = settings.num_cells(count)
    choices: tuple[Layout, ...] = ("fast-scan", "fast-scan-small")
    for layout in choices:
        if _memory(layout, count, dim, cells) <= budget:
            return layout, f"{count:,} images are more than {settings.exact_below:,}, and it fits {_gigabytes(budget)}"
    least = _memory(choices[-1], count, dim, cells)
    raise UsageError(
        f"expected memory for {count:,} images of {dim} numbers, {_gigabytes(least)} at least, got {_gigabytes(budget)}: "
        "allow more, or spread the images over machines (see the guide to large indexes)"
    )


def _memory(layout: Layout, count: int, dim: int, cells: int) -> int:
    return count * (code_bytes(layout, dim) + ID_BYTES) + 4 * dim * (cells + dim)


def _machine_memory() -> int:
    """Bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 16 * 2**30


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
