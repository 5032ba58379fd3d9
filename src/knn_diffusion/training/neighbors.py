"""What the denoiser trains on: each image's tokens, its embedding and its neighbors', looked up as they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from knn_diffusion.errors import UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.neighbors import EVERY_PAIR
from knn_diffusion.tokens import Examples
from knn_diffusion.training.data import Batch, cached_array

CHUNK = 256
ABSENT = -1
FEW = 100
"""Where fewer than one in so many of a large index are asked for, comparing each with all is cheaper than making all lists."""
WHOLE = "neighbors-of-the-index.npy"
"""The lists of all images of the index, until those of the run's own images are kept."""


@runtime_checkable
class Rows(Protocol):
    """An array, or something on the disk that is read like one."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Int[np.ndarray, "*some"], /) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiserData:
    """Images as the denoiser sees them; a `Dataset`.

    examples    [records] of `tokens` and `embedding`, the codes of an image and its own place in H
    items       [items] which of the examples these are; no image twice
    neighbors   [items, k] rows of `table`, nearest first, -1 where there are fewer; never the image itself
    table       [rows, dim] embeddings of the index
    """

    examples: Rows
    items: Int[np.ndarray, "items"]
    neighbors: Int[np.ndarray, "items k"]
    table: Rows

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Int[Tensor, "batch"], generator: torch.Generator) -> Batch:
        """`tokens`, `query`, `neighbors` and `present` of these images."""
        rows = indices.numpy()
        found, neighbors = self.examples[self.items[rows]], self.neighbors[rows]
        return {
            "tokens": torch.from_numpy(found["tokens"].astype(np.int64)),
            "query": torch.from_numpy(found["embedding"].astype(np.float32)),
            "neighbors": torch.from_numpy(self.table[neighbors.clip(0)].astype(np.float32)),
            "present": torch.from_numpy(neighbors != ABSENT),
        }

    def split(self, validation: int) -> tuple[DenoiserData, DenoiserData]:
        """The first items for training, the last `validation` for judging it; both may neighbor the whole index."""
        cut = len(self) - validation
        return self._rows(slice(0, cut)), self._rows(slice(cut, None))

    def _rows(self, rows: slice) -> DenoiserData:
        return DenoiserData(
            examples=self.examples, items=self.items[rows], neighbors=self.neighbors[rows], table=self.table
        )


def prepare(
    examples: Examples, index: ImageIndex, k: int, cache: Path, progress: Progress | None = None
) -> DenoiserData:
    """Lines 2, 5 and 7 of Algorithm 1 for all images: neighbor lists are kept in `cache` under what they were made from.

    Raises: UsageError when the index is too small to give any image k neighbors besides itself, or is changed meanwhile.
    """
    if k and len(index) < k + 1:
        raise UsageError(
            f"expected an index of more than {k} images, got {len(index)}: add images or train with fewer neighbors "
            f"(--set conditioning.k={max(0, len(index) - 1)})"
        )
    digest = index.digest

    def of_one_moment() -> Int[np.ndarray, "items k"]:
        found = find_neighbors(examples, items, index, k, progress, cache)
        _require_unchanged(index, digest)
        return found

    items = cached_array(cache, "items", {"examples": examples.digest}, lambda: first_of_each(examples.contents))
    facts = {"examples": examples.digest, "index": digest, "k": k}
    neighbors, table = cached_array(cache, "neighbors", facts, of_one_moment), index.table()
    (cache / WHOLE).unlink(missing_ok=True)
    _require_unchanged(index, digest)
    return DenoiserData(examples=examples, items=items, neighbors=neighbors, table=table)


def _require_unchanged(index: ImageIndex, digest: str) -> None:
    """Raise UsageError when the rows of neighbors may be those of other images by now."""
    if index.digest != digest:
        raise UsageError(
            f"expected an index that nobody changes while neighbors are looked up, {index.folder or 'that in memory'} was "
            "changed: give the same command again, or train with a copy of the index"
        )


def first_of_each(contents: UInt8[np.ndarray, "images digest"]) -> Int[np.ndarray, "items"]:
    """The first image with each content, in their order: a picture that lies in several shards counts once."""
    keys = np.ascontiguousarray(contents[:, :8]).view(np.uint64).ravel()
    return np.sort(np.unique(keys, return_index=True)[1])


def find_neighbors(
    examples: Examples,
    items: Int[np.ndarray, "items"],
    index: ImageIndex,
    k: int,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Int[np.ndarray, "items k"]:
    """Rows of the K nearest images of every item, itself and its near-duplicates left out (Eq. 4, A.4).

    When the index is large, the lists of all its images are made at once, which is far cheaper; with a `cache` folder an
    interrupted call goes on there. Images that the index does not have are looked up one by one.
    """
    table = np.full((len(items), k), ABSENT, np.int32 if len(index) < 2**31 else np.int64)
    if not k:
        return table
    own = index.places_of(examples.contents)[items]
    alone = np.ones(len(items), bool)
    if len(index) > EVERY_PAIR and FEW * (own != ABSENT).sum() >= len(index):
        alone = own == ABSENT
        whole = cache / WHOLE if cache is not None else None
        table[~alone] = index.self_neighbors(k, output=whole, progress=progress)[own[~alone]]
    left = np.flatnonzero(alone)
    for start in range(0, len(left), CHUNK):
        some = left[start : start + CHUNK]
        queries = examples[items[some]]["embedding"].astype(np.float32)
        table[some] = index.neighbor_rows(queries, k, own[some])
        if progress is not None:
            progress("finding neighbors", min(start + CHUNK, len(left)), len(left))
    return table
