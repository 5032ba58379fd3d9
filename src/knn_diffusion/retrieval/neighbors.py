"""Neighbor lists for training, of many images at once: paper Sec. 3.2, each image and its copies left out (A.4)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from knn_diffusion.checkpoint import atomic_write_bytes
from knn_diffusion.device import own_defaults
from knn_diffusion.errors import UsageError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.cell_join import UnfinishedTable, join_cells, lay_out
from knn_diffusion.retrieval.dedup import OFF, DedupConfig, duplicates, first_different, gather
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store
from knn_diffusion.retrieval.stored_array import npy_bytes

EVERY_PAIR = 50_000
"""Up to so many images every pair is compared."""
QUERY_ROWS, ITEM_ROWS = 1024, 16_384
ABSENT = -1
_MAX_VALUES = 2**25  # of candidate vectors held at once


@own_defaults()
def self_neighbors(
    store: Store,
    k: int,
    rule: DedupConfig,
    *,
    snapshot: Snapshot | None = None,
    device: torch.device | str = "cpu",
    output: Path | None = None,
    progress: Progress | None = None,
) -> Int[np.ndarray, "items k"]:
    """For every image the places of its k nearest others among the images that are not removed, best first.

    Left out are the image itself, by its place, and images that show the same picture by `rule`, held against it and
    against each other. Up to EVERY_PAIR images every pair is compared; beyond, those that lie in near cells
    (`cell_join`), which misses less than one in a hundred.

    Args:
        snapshot: whose images; None for those of now.
        output: a .npy file to write the table to as it comes; an interrupted call goes on there.

    Returns: places in the order of `Snapshot.live_rows`, -1 where too few images are left; int64 beyond 2³¹ images.
    Raises: UsageError when k is below 1; StoreError when the store is damaged.
    """
    finder = _finder(store, snapshot or store.snapshot(), k, rule, device)
    if len(finder.rows) > EVERY_PAIR:
        return _joined(finder, output, progress)
    table = finder.empty_table(len(finder.rows))
    for start in range(0, len(table), QUERY_ROWS):
        own = np.arange(start, min(start + QUERY_ROWS, len(table)))
        queries, _ = gather(store, finder.rows[own], finder.snapshot)
        table[own] = finder.find(queries.to(finder.device), own[:, None])
        if progress is not None:
            progress("finding neighbors", int(own[-1]) + 1, len(table))
    if output is not None:
        atomic_write_bytes(output, npy_bytes(table))
    return table


def _joined(finder: _Finder, output: Path | None, progress: Progress | None) -> Int[np.ndarray, "items k"]:
    """By cells; what is done lies beside `output` until the table is whole."""

    def choose(queries: Tensor, own: np.ndarray, places: np.ndarray) -> np.ndarray:
        return finder.choose(queries, own[:, None], places)

    table, kept = finder.empty_table(len(finder.rows)), None
    if output is not None:
        kept = UnfinishedTable.open(output, table.shape, table.dtype, finder.digest)
        table = kept.table
    layout = lay_out(finder.store, finder.snapshot, output.parent if output is not None else None, progress)
    join_cells(layout, table, 4 * finder.k + 9, choose, finder.device, kept=kept, progress=progress)
    return table if kept is None else kept.finish()


@own_defaults()
def neighbors_of(
    store: Store,
    queries: Float32[np.ndarray, "queries dim"],
    excluded: Int[np.ndarray, "queries excluded"],
    k: int,
    rule: DedupConfig,
    *,
    snapshot: Snapshot | None = None,
    device: torch.device | str = "cpu",
) -> Int[np.ndarray, "queries k"]:
    """As `self_neighbors`, for images given by their unit vectors.

    Args:
        snapshot: that the places are of; None for now.
        excluded: places that each query must not find, filled with -1. The first one is the query's own, if it is there,
            and lends its 8×8 picture to be held against the others.
    """
    finder = _finder(store, snapshot or store.snapshot(), k, rule, device)
    table = finder.empty_table(len(queries))
    for start in range(0, len(table), QUERY_ROWS):
        some = slice(start, start + QUERY_ROWS)
        table[some] = finder.find(torch.from_numpy(queries[some].copy()).to(finder.device), excluded[some])
    return table


def _finder(store: Store, snapshot: Snapshot, k: int, rule: DedupConfig, device: torch.device | str) -> _Finder:
    if k < 1:
        raise UsageError(f"k must be at least 1, got {k}: ask for one neighbor or more")
    return _Finder(store=store, snapshot=snapshot, rows=snapshot.live_rows, k=k, rule=rule, device=torch.device(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Finder:
    store: Store
    snapshot: Snapshot
    rows: Int[np.ndarray, "items"]
    k: int
    rule: DedupConfig
    device: torch.device

    @property
    def digest(self) -> str:
        """Of all that decides what a table of self-neighbors holds."""
        alive = np.packbits(self.snapshot.alive).tobytes()
        parts = (self.snapshot.digest(len(self.snapshot.segments)).encode(), alive, repr((self.k, self.rule)).encode())
        return hashlib.sha256(b" ".join(parts)).hexdigest()

    def empty_table(self, count: int) -> Int[np.ndarray, "queries k"]:
        return np.full((count, self.k), ABSENT, np.int32 if len(self.rows) < 2**31 else np.int64)

    def find(
        self, queries: Float[Tensor, "queries dim"], excluded: Int[np.ndarray, "queries excluded"]
    ) -> Int[np.ndarray, "queries k"]:
        """Fetch more and more candidates until k remain for every query or nothing is left."""
        out = np.full((len(queries), self.k), ABSENT, np.int64)
        pending, total = np.arange(len(queries)), len(self.rows)
        fetch = min(4 * self.k + 8 + excluded.shape[1], total)
        while len(pending) and fetch:
            places = self._nearest(queries[pending], fetch)
            out[pending] = self.choose(queries[pending], excluded[pending], places)
            if fetch == total:
                break
            pending, fetch = pending[out[pending, -1] < 0], min(4 * fetch, total)
        return out

    def _nearest(self, queries: Float[Tensor, "queries dim"], fetch: int) -> Int[np.ndarray, "queries fetch"]:
        """The places of the `fetch` nearest images, best first."""
        best = torch.full((len(queries), 0), -torch.inf, device=self.device)
        places = torch.zeros((len(queries), 0), dtype=torch.long, device=self.device)
        for start in range(0, len(self.rows), ITEM_ROWS):
            vectors = torch.from_numpy(self.store.embeddings(self.rows[start : start + ITEM_ROWS], self.snapshot))
            items = torch.nn.functional.normalize(vectors.to(self.device).float(), dim=1)
            numbers = torch.arange(start, start + len(items), device=self.device).expand(len(queries), -1)
            scores, numbers = torch.cat([best, queries @ items.T], 1), torch.cat([places, numbers], 1)
            best, top = scores.topk(min(fetch, scores.shape[1]), dim=1)
            places = numbers.gather(1, top)
        return places.cpu().numpy()

    def choose(
        self,
        queries: Float[Tensor, "queries dim"],
        excluded: Int[np.ndarray, "queries excluded"],
        places: Int[np.ndarray, "queries fetch"],
    ) -> Int[np.ndarray, "queries k"]:
        """The first k of the candidates that are neither excluded nor copies.

        Most lists repeat nothing among their first k, and then no more than these must be looked at.
        """
        allowed = np.where((places[:, :, None] == excluded[:, None, :]).any(-1), ABSENT, places)
        first = np.take_along_axis(allowed, np.argsort(allowed < 0, axis=1, kind="stable")[:, : self.k], 1)
        first = np.pad(first, ((0, 0), (0, self.k - first.shape[1])), constant_values=ABSENT)
        if self.rule == OFF:
            return first
        out = self._different(queries, excluded, first)
        short = np.flatnonzero(out[:, -1] < 0)
        out[short] = self._different(queries[torch.from_numpy(short)], excluded[short], allowed[short])
        return out

    def _different(
        self,
        queries: Float[Tensor, "queries dim"],
        excluded: Int[np.ndarray, "queries excluded"],
        places: Int[np.ndarray, "queries candidates"],
    ) -> Int[np.ndarray, "queries k"]:
        """The first k that are there and no copies, of the query or each other; a bounded number of queries at a time."""
        out = np.empty((len(places), self.k), np.int64)
        step = max(1, _MAX_VALUES // (places.shape[1] * self.store.encoder.dim))
        for start in range(0, len(places), step):
            some = slice(start, start + step)
            shape = places[some].shape
            vectors, pictures = (part.to(self.device) for part in self._gather(np.maximum(places[some], 0).ravel()))
            vectors, pictures = vectors.view(*shape, -1), pictures.view(*shape, -1)
            valid = torch.from_numpy(places[some] >= 0).to(self.device)
            valid &= ~duplicates(queries[some], self._pictures(excluded[some]), vectors, pictures, self.rule)
            chosen = first_different(vectors, pictures, valid, self.k, self.rule).cpu().numpy()
            out[some] = np.where(chosen < 0, ABSENT, np.take_along_axis(places[some], np.maximum(chosen, 0), 1))
        return out

    def _gather(self, places: Int[np.ndarray, "some"]) -> tuple[Tensor, Tensor]:
        return gather(self.store, self.rows[places], self.snapshot)

    def _pictures(self, excluded: Int[np.ndarray, "queries excluded"]) -> Tensor:
        """The queries' own 8×8 pictures, -1 where a query is not in the index."""
        own = excluded[:, 0] if excluded.shape[1] else np.full(len(excluded), ABSENT)
        _, pictures = self._gather(np.maximum(own, 0))
        pictures[torch.from_numpy(own < 0)] = ABSENT
        return pictures.to(self.device)
