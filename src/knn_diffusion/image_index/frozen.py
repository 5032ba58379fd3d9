"""An index as a training sees it: as it was at one moment, whatever is added, removed or compacted meanwhile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, UInt8

from knn_diffusion.image_index.catalog import content_keys, digest
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.dedup import DedupConfig
from knn_diffusion.retrieval.neighbors import neighbors_of, self_neighbors
from knn_diffusion.retrieval.segments import unit_rows
from knn_diffusion.retrieval.store import Store

ABSENT = -1


class FrozenIndex:
    """The images of one moment by their places, 0 … len - 1 in the order they were added.

    Embeddings are read as they are asked for; eight bytes an image are held.
    """

    def __init__(self, store: Store, rule: DedupConfig) -> None:
        self._store, self._rule, self._snapshot = store, rule, store.snapshot()
        self._rows = self._snapshot.live_rows
        self.shape = (len(self._rows), store.encoder.dim)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, places: Int[np.ndarray, "*some"]) -> Float16[np.ndarray, "*some dim"]:
        """The stored unit vectors at these places, copied. Raises: StoreError when the index is damaged."""
        vectors = self._store.embeddings(self._rows[places.ravel()], self._snapshot)
        return vectors.reshape(*places.shape, self.shape[1])

    @property
    def digest(self) -> str:
        """Another one when the images, their order, or the rule of de-duplication were others."""
        return digest(self._store, self._snapshot, self._rule)

    def places_of(self, contents: UInt8[np.ndarray, "images digest"]) -> Int[np.ndarray, "images"]:
        """Where images with these SHA-256 of their pixels lie, -1 for those that are not there.

        They are found by the first eight bytes: among 100 million images any two are mistaken for each other in one index of
        4,000.
        """
        keys = content_keys(self._store, self._snapshot)
        if not len(keys):
            return np.full(len(contents), ABSENT, np.int64)
        order = np.argsort(keys, kind="stable")
        wanted = np.ascontiguousarray(contents[:, :8]).view(">u8").ravel().astype(np.uint64)
        found = np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)
        return np.where(keys[order[found]] == wanted, order[found], ABSENT)

    def neighbor_places(
        self,
        queries: Float[np.ndarray, "queries dim"],
        k: int,
        own: Int[np.ndarray, "queries"] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> Int[np.ndarray, "queries k"]:
        """The places nearest to each image, -1 where too few are left; near-copies left out.

        Args:
            own: the place of each image itself, -1 where it is not there; it is left out.
        """
        units = unit_rows(queries, self.shape[1], "queries")
        excluded = np.full(len(queries), ABSENT) if own is None else own
        return neighbors_of(
            self._store, units, excluded[:, None], k, self._rule, snapshot=self._snapshot, device=device
        )

    def self_neighbors(
        self,
        k: int,
        *,
        output: Path | None = None,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> Int[np.ndarray, "items k"]:
        """The places nearest to each of them, itself and its near-copies left out.

        Args:
            output: a .npy file for the table, which then is mapped, not held; an interrupted call goes on there.
        """
        return self_neighbors(
            self._store, k, self._rule, snapshot=self._snapshot, device=device, output=output, progress=progress
        )
