"""What the denoiser trains on: each image's tokens, its embedding and its neighbors', looked up as they are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from knn_diffusion.errors import UsageError
from knn_diffusion.image_index import FrozenIndex
from knn_diffusion.randomness import rand
from knn_diffusion.retrieval.neighbors import EVERY_PAIR
from knn_diffusion.tokens import Examples
from knn_diffusion.training.conditioning import (
    ABSENT,
    ConditioningConfig,
    leaders,
    left_in,
    most_alike,
    moved,
    swapped,
)
from knn_diffusion.training.data import Batch, cached_array, facts_key
from knn_diffusion.training.options import RunOptions

CHUNK, ROWS_AT_ONCE = 256, 1_000_000
FEW = 100
"""Where fewer than one in so many of a large index are asked for, comparing each with all is cheaper than making all lists."""
MANY_PAIRS = 10**10
"""Comparing so many takes minutes."""
WHOLE = "neighbors-of-the-index"
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
    neighbors   [items, k] places in `table`, nearest first, -1 where there are fewer; never the image itself
    table       [rows, dim] embeddings of the index
    shown       what is done to the neighbors before they are shown; None shows them all as they are
    grid_m      of how many neighbors the tokens are given too
    grid_rows   [rows] which of the examples each row of `table` is, -1 where it is none; None where no tokens are given
    """

    examples: Rows
    items: Int[np.ndarray, "items"]
    neighbors: Int[np.ndarray, "items k"]
    table: Rows
    shown: ConditioningConfig | None = None
    grid_m: int = 0
    grid_rows: Int[np.ndarray, "rows"] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Int[Tensor, "batch"], generator: torch.Generator) -> Batch:
        """`tokens`, `query`, `neighbors` and `present` of these images; with `grid_m` also `grids` and `grids_present`."""
        rows = indices.numpy()
        found, lists = self.examples[self.items[rows]], self.neighbors[rows]
        tokens = found["tokens"].astype(np.int64)
        if self.shown is not None:
            lists = left_in(lists, self.shown, generator)
            if self.grid_m and lists.shape[1] > 1:
                lists = self._led(tokens, lists, self.shown, generator)
        batch = {
            "tokens": torch.from_numpy(tokens),
            "query": torch.from_numpy(found["embedding"].astype(np.float32)),
            "neighbors": torch.from_numpy(self.table[lists.clip(0)].astype(np.float32)),
            "present": torch.from_numpy(lists != ABSENT),
        }
        return batch | self._grids(lists, generator) if self.grid_m else batch

    def _led(
        self,
        tokens: Int[np.ndarray, "batch seq"],
        lists: Int[np.ndarray, "batch k"],
        shown: ConditioningConfig,
        generator: torch.Generator,
    ) -> Int[np.ndarray, "batch k"]:
        """The neighbors with another one first here and there."""
        styled = np.zeros(len(lists), np.int64)
        if shown.style_leader > 0:
            grids, there = self._tokens_of(lists)
            styled = most_alike(tokens, grids, there)
        counts = (lists[:, : self.grid_m] != ABSENT).sum(1)
        return swapped(lists, leaders(counts, styled, shown, generator))

    def _grids(self, lists: Int[np.ndarray, "batch k"], generator: torch.Generator) -> dict[str, Tensor]:
        tokens, there = self._tokens_of(lists[:, : self.grid_m])
        grids, present = torch.from_numpy(tokens), torch.from_numpy(there)
        if self.shown is not None:
            hidden = rand(len(lists), generator=generator) < self.shown.grid_dropout
            grids, present = moved(grids, self.shown.grid_shift, generator), present & ~hidden[:, None]
        return {"grids": grids, "grids_present": present}

    def _tokens_of(self, lists: Int[np.ndarray, "batch some"]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of these images of the index, and whether they are among the examples."""
        assert self.grid_rows is not None
        rows = np.where(lists == ABSENT, ABSENT, self.grid_rows[lists.clip(0)])
        tokens = self.examples[rows.clip(0).ravel()]["tokens"].astype(np.int64)
        return tokens.reshape(*rows.shape, -1), rows != ABSENT

    def split(self, validation: int) -> tuple[DenoiserData, DenoiserData]:
        """The first items for training, the last `validation` for judging it; both may neighbor the whole index."""
        cut = len(self) - validation
        steady = None if self.shown is None else self.shown.steady
        return self._rows(slice(0, cut)), replace(self._rows(slice(cut, None)), shown=steady)

    def _rows(self, rows: slice) -> DenoiserData:
        return replace(self, items=self.items[rows], neighbors=self.neighbors[rows])


def prepare(
    examples: Examples,
    index: FrozenIndex,
    k: int,
    cache: Path,
    told: RunOptions,
    *,
    shown: ConditioningConfig | None = None,
    grid_m: int = 0,
) -> DenoiserData:
    """Lines 2, 5 and 7 of Algorithm 1 for all images: neighbor lists are kept in `cache` under what they were made from.

    Args:
        shown: what is done to the neighbors, of which it may want more than k to choose from.
        grid_m: of how many neighbors the tokens are read too: of those that are among the examples.
    Raises: UsageError when the index is too small to give any image k neighbors besides itself.
    """
    if k and len(index) < k + 1:
        raise UsageError(
            f"expected an index of more than {k} images, got {len(index)}: add images or train with fewer neighbors "
            f"(--set conditioning.k={max(0, len(index) - 1)})"
        )
    k = max(k, min(shown.kept if shown is not None else 0, len(index) - 1))
    facts = {"examples": examples.digest, "index": index.digest, "k": k}
    items = cached_array(cache, "items", {"examples": examples.digest}, lambda: first_of_each(examples.contents))
    neighbors = cached_array(cache, "neighbors", facts, lambda: find_neighbors(examples, items, index, k, told, cache))
    for whole in cache.glob(f"{WHOLE}*"):
        whole.unlink()
    data = DenoiserData(examples=examples, items=items, neighbors=neighbors, table=index, shown=shown)
    if not grid_m:
        return data
    facts = {"examples": examples.digest, "index": index.digest}
    grid_rows = cached_array(cache, "grid-rows", facts, lambda: examples_in(index, examples))
    return replace(data, grid_m=grid_m, grid_rows=grid_rows)


def examples_in(index: FrozenIndex, examples: Examples) -> Int[np.ndarray, "rows"]:
    """Which of the examples each image of the index is, ABSENT where it is none."""
    places = index.places_of(examples.contents)
    there = np.flatnonzero(places != ABSENT)
    rows = np.full(len(index), ABSENT, np.int32 if len(examples) < 2**31 else np.int64)
    rows[places[there]] = there
    return rows


def first_of_each(contents: UInt8[np.ndarray, "images digest"]) -> Int[np.ndarray, "items"]:
    """The first image with each content, in their order: a picture that lies in several shards counts once."""
    keys = np.ascontiguousarray(contents[:, :8]).view(np.uint64).ravel()
    return np.sort(np.unique(keys, return_index=True)[1])


def find_neighbors(
    examples: Examples,
    items: Int[np.ndarray, "items"],
    index: FrozenIndex,
    k: int,
    told: RunOptions,
    cache: Path,
) -> Int[np.ndarray, "items k"]:
    """Places of the K nearest images of every item, itself and its near-duplicates left out (Eq. 4, A.4).

    When the index is large, the lists of all its images are made at once, which is far cheaper; an interrupted call goes on in
    the `cache` folder. Images that the index does not have are compared with all of its images.
    """
    table = np.full((len(items), k), ABSENT, np.int32 if len(index) < 2**31 else np.int64)
    if not k:
        return table
    own = index.places_of(examples.contents)[items]
    alone = np.ones(len(items), bool)
    if len(index) > EVERY_PAIR and FEW * (own != ABSENT).sum() >= len(index):
        alone = own == ABSENT
        whole, there = _whole(index, k, told, cache), np.flatnonzero(~alone)
        for start in range(0, len(there), ROWS_AT_ONCE):
            some = there[start : start + ROWS_AT_ONCE]
            table[some] = whole[own[some]]
    left = np.flatnonzero(alone)
    if len(left) * len(index) > MANY_PAIRS and told.notice is not None:
        told.notice(
            f"{len(left):,} of the {len(items):,} images are compared with all {len(index):,} of the index, as it does not "
            "have them by their pixels: with an index of the same images (index add) this takes a fraction of the time"
        )
    for start in range(0, len(left), CHUNK):
        some = left[start : start + CHUNK]
        queries = examples[items[some]]["embedding"].astype(np.float32)
        table[some] = index.neighbor_places(queries, k, own[some])
        if told.report is not None:
            told.report("finding neighbors", min(start + CHUNK, len(left)), len(left))
    return table


def _whole(index: FrozenIndex, k: int, told: RunOptions, cache: Path) -> Int[np.ndarray, "images k"]:
    """The lists of all images of the index; those that were complete when a call was interrupted are there."""
    place = cache / f"{WHOLE}-{facts_key({'index': index.digest, 'k': k})}.npy"
    if place.is_file():
        return np.load(place, mmap_mode="r")
    return index.self_neighbors(k, output=place, progress=told.report)
