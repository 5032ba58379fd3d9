"""Faiss indexes over cells (paper A.3): trained on a sample of the embeddings, then filled a block of rows at a time.

Cells are those of spherical k-means, and a query looks into the cells of the largest inner product with their unit
centroids: for texts, which lie far from every image, ranking cells by distance or by their means finds fewer. Codes are
trained on images rotated by OPQ. With very many cells the centroids are themselves searched by short codes, because
comparing all would cost more than the search inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from knn_diffusion.retrieval.plan import (
    BITS_PER_CODE,
    KMEANS_ITERATIONS,
    POINTS_PER_CELL,
    Layout,
    num_codes,
)

MANY_CELLS = 4_096
"""From so many cells on their centroids are searched by codes."""
FEW_QUERIES = 16
"""Up to so many are searched for on one thread."""
ROTATION_SAMPLE, ROTATION_ITERATIONS = 16_384, 8
CODE_SAMPLE = 100_000


def train_index(layout: Layout, sample: Float32[np.ndarray, "rows dim"], cells: int) -> Any:
    """An empty faiss index of this layout, ready to take rows. Deterministic for the same sample.

    Args:
        sample: unit vectors, at least as many as cells; fewer than a code needs are repeated.
    """
    faiss, dim = faiss_module(), sample.shape[1]
    # With fewer vectors than centroids faiss refuses, with fewer than dimensions its OPQ writes beyond its memory (1.15.1).
    enough = np.resize(sample, (max(len(sample), 256, 2 * dim), dim))
    if layout == "sq8":
        coarse = coarse_index(spherical_centroids(enough, cells))
        index = faiss.IndexIVFScalarQuantizer(
            coarse, dim, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        coarse.this.disown()
        index.own_fields = True
        index.train(enough[:CODE_SAMPLE])
        return index
    rotation = _rotation(enough, num_codes(layout, dim))
    turned = rotation.apply(enough)
    coarse = coarse_index(spherical_centroids(turned, cells))
    kind = faiss.IndexIVFPQ if layout == "paper" else faiss.IndexIVFPQFastScan
    index = kind(coarse, dim, cells, num_codes(layout, dim), BITS_PER_CODE[layout], faiss.METRIC_INNER_PRODUCT)
    coarse.this.disown()
    index.own_fields = True
    index.by_residual = True
    index.pq.cp.min_points_per_centroid = 1
    index.train(turned[:CODE_SAMPLE])
    rotated = faiss.IndexPreTransform(rotation, index)
    rotation.this.disown()
    index.this.disown()
    rotated.own_fields = True
    return rotated


def search_cells(
    index: Any,
    queries: Float32[np.ndarray, "queries dim"],
    depth: int,
    probes: int,
    allowed: bytes | None,
) -> Int64[np.ndarray, "queries depth"]:
    """Records that are nearest by their codes, filled with -1; the index is never changed by a request.

    Args:
        probes: at most the number of cells.
        allowed: one bit for each record, 1 for those that may be found; None for all.
    """
    faiss = faiss_module()
    rotated = isinstance(index, faiss.IndexPreTransform)
    if allowed is None:
        parameters = _kept_parameters(probes, rotated)
    else:
        parameters = _parameters(probes, rotated, sel=faiss.IDSelectorBitmap(np.frombuffer(allowed, np.uint8)))
    with threads_for(len(queries)):
        return index.search(queries, depth, params=parameters)[1]


def _parameters(probes: int, rotated: bool, **options: Any) -> Any:
    """Faiss's parameters of one search."""
    faiss = faiss_module()
    parameters = faiss.SearchParametersIVF(nprobe=probes, **options)
    return faiss.SearchParametersPreTransform(index_params=parameters) if rotated else parameters


_kept_parameters = lru_cache(maxsize=64)(_parameters)
"""Faiss only reads them, and making them anew takes a tenth of a search."""


def read_cells(path: Path) -> Any:
    """An index from its file, of which this version decides how it is searched. Nothing is verified."""
    faiss = faiss_module()
    index = faiss.read_index(str(path))
    coarse = faiss.downcast_index(faiss.extract_index_ivf(index).quantizer)
    if isinstance(coarse, faiss.IndexRefine):
        coarse.k_factor = _centroids_compared(coarse.ntotal)
    return index


def add_rows(index: Any, vectors: Float32[np.ndarray, "rows dim"], records: Int64[np.ndarray, "rows"]) -> None:
    """Put unit vectors into their cells, each as its record."""
    index.add_with_ids(np.ascontiguousarray(vectors), records)


def drop_others(index: Any, kept: Bool[np.ndarray, "records"]) -> None:
    """Take all records out that are not marked as kept."""
    faiss, marked = faiss_module(), np.packbits(kept, bitorder="little")
    index.remove_ids(faiss.IDSelectorNot(faiss.IDSelectorBitmap(marked)))


def empty_like(index: Any) -> Any:
    """A trained index with the same cells and codes, and no rows."""
    made = faiss_module().clone_index(index)
    made.reset()
    return made


def take_rows(index: Any, other: Any) -> None:
    """Move all rows of `other`, which was trained together with it, into the index; `other` is left empty."""
    faiss = faiss_module()
    lists, others = (faiss.downcast_InvertedLists(faiss.extract_index_ivf(one).invlists) for one in (index, other))
    if isinstance(lists, faiss.BlockInvertedLists):
        _take_onto_whole_blocks(lists, others)
    index.merge_from(other, 0)


def _take_onto_whole_blocks(lists: Any, others: Any) -> None:
    """Move what lies in cells where faiss would write beyond its memory: their number of rows is a multiple of a block's *bytes*.

    Faiss (1.15.1) then takes such a list for one of whole blocks, as it is, and copies them behind twice its length.
    """
    faiss = faiss_module()
    for cell in range(lists.nlist):
        held, more = lists.list_size(cell), others.list_size(cell)
        if not held or not more or held % lists.block_size:
            continue
        lists.resize(cell, held + more)
        first, blocks = held // lists.n_per_block, -(-more // lists.n_per_block)
        ids, codes = faiss.rev_swig_ptr(lists.get_ids(cell), held + more), lists.get_codes(cell)
        ids[held:] = faiss.rev_swig_ptr(others.get_ids(cell), more)
        placed = faiss.rev_swig_ptr(codes, (first + blocks) * lists.block_size)
        placed[first * lists.block_size :] = faiss.rev_swig_ptr(others.get_codes(cell), blocks * lists.block_size)
        others.resize(cell, 0)


def merged(first: Any, *others: Any) -> Any:
    """A new index with the rows of all; they stay as they are."""
    clone = faiss_module().clone_index
    whole = clone(first)
    for other in others:
        take_rows(whole, clone(other))
    return whole


def cell_distances(index: Any, vectors: Float32[np.ndarray, "rows dim"]) -> Float32[np.ndarray, "rows"]:
    """1 - cosine of each unit vector with the centroid of its cell."""
    return 1 - _nearest_cells(index, vectors, 1)[0][:, 0]


def list_sizes(index: Any) -> Int64[np.ndarray, "cells"]:
    """How many rows each cell holds."""
    lists = faiss_module().extract_index_ivf(index).invlists
    return np.array([lists.list_size(cell) for cell in range(lists.nlist)], np.int64)


def spherical_centroids(sample: Float32[np.ndarray, "rows dim"], cells: int) -> Float32[np.ndarray, "cells dim"]:
    """Unit centroids by spherical k-means, the same for the same sample."""
    kmeans = faiss_module().Kmeans(
        sample.shape[1],
        cells,
        niter=KMEANS_ITERATIONS,
        spherical=True,
        seed=1,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CELL,
    )
    kmeans.train(np.ascontiguousarray(sample))
    return kmeans.centroids


def nearest_centroids(
    centroids: Float32[np.ndarray, "cells dim"], vectors: Float32[np.ndarray, "rows dim"], count: int
) -> Int[np.ndarray, "rows count"]:
    """The `count` centroids with the largest inner product with each vector, best first."""
    return coarse_index(centroids).search(np.ascontiguousarray(vectors), count)[1]


def num_cells(index: Any) -> int:
    """Cells of an index."""
    return int(faiss_module().extract_index_ivf(index).nlist)


@contextmanager
def threads_for(queries: int) -> Iterator[None]:
    """Faiss searches for a few queries on the calling thread, for many on as many threads as there are processors.

    Threads wait for each other at every step. On a busy machine that can take a hundred times as long as a search.
    """
    faiss = faiss_module()
    before = faiss.omp_get_max_threads()
    if queries > FEW_QUERIES or before == 1:
        yield
        return
    faiss.omp_set_num_threads(1)  # of this thread's searches alone
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def faiss_module() -> Any:
    """Faiss, imported when first needed: an index in which every image is compared never does."""
    import faiss

    return faiss


def _nearest_cells(index: Any, vectors: Float32[np.ndarray, "rows dim"], count: int) -> Any:
    """Inner products with the nearest centroids, and their cells."""
    faiss = faiss_module()
    if isinstance(index, faiss.IndexPreTransform):
        vectors = faiss.downcast_VectorTransform(index.chain.at(0)).apply(np.ascontiguousarray(vectors))
    return faiss.extract_index_ivf(index).quantizer.search(np.ascontiguousarray(vectors), count)


def coarse_index(centroids: Float32[np.ndarray, "cells dim"]) -> Any:
    """What finds the cells of a vector: every centroid compared, or the best by short codes compared again."""
    faiss, dim = faiss_module(), centroids.shape[1]
    if len(centroids) < MANY_CELLS:
        index = faiss.IndexFlatIP(dim)
    else:
        codes = faiss.IndexPQFastScan(dim, num_codes("fast-scan", dim), 4, faiss.METRIC_INNER_PRODUCT)
        index = faiss.IndexRefineFlat(codes)
        codes.this.disown()
        index.own_fields = True
        index.k_factor = _centroids_compared(len(centroids))
        index.train(centroids)
    index.add(centroids)
    return index


def _centroids_compared(cells: int) -> int:
    """Centroids compared for each cell wanted, when they are searched by codes: 98 % or more of a text's cells are right.

    Measured with 4,096 to 131,072 cells of CLIP-like vectors; of an image's cells all are right with as many.
    """
    return max(4, round(np.log2(cells)) - 8)


def _rotation(sample: Float32[np.ndarray, "rows dim"], parts: int) -> Any:
    """OPQ with four-bit codes: a rotation that serves one length of code serves the other."""
    faiss, dim = faiss_module(), sample.shape[1]
    rotation = faiss.OPQMatrix(dim, parts)
    codes = faiss.ProductQuantizer(dim, parts, 4)
    codes.cp.min_points_per_centroid = 1
    rotation.pq = codes
    rotation.niter, rotation.max_train_points = ROTATION_ITERATIONS, ROTATION_SAMPLE
    rotation.train(np.ascontiguousarray(sample[:ROTATION_SAMPLE]))
    rotation.pq = None
    return rotation
