"""The embeddings of an index as a table that stays what it is, whatever is added, removed or compacted meanwhile."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float16, Int, UInt8

from knn_diffusion.image_index.catalog import content_keys
from knn_diffusion.retrieval.store import Store

ABSENT = -1


class EmbeddingTable:
    """The stored unit vectors, in the order the images were added: `table[places]`, read as they are asked for.

    Nothing is held in memory but which rows are not removed, eight bytes an image.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._snapshot = store, store.snapshot()
        self._rows = self._snapshot.live_rows
        self.shape = (len(self._rows), store.encoder.dim)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, places: Int[np.ndarray, "*some"]) -> Float16[np.ndarray, "*some dim"]:
        """These vectors, copied. Raises: StoreError when the index is damaged."""
        vectors = self._store.embeddings(self._rows[places.ravel()], self._snapshot)
        return vectors.reshape(*places.shape, self.shape[1])


def places_of(store: Store, contents: UInt8[np.ndarray, "images digest"]) -> Int[np.ndarray, "images"]:
    """Where images with these content digests lie in the table, -1 for those the index does not have.

    They are found by the first eight bytes: of 100 million images two are mistaken for each other once in 4,000 indexes.
    """
    keys = store.consistently(lambda now: content_keys(store, now))
    if not len(keys):
        return np.full(len(contents), ABSENT, np.int64)
    order = np.argsort(keys, kind="stable")
    wanted = np.ascontiguousarray(contents[:, :8]).view(">u8").ravel().astype(np.uint64)
    found = np.searchsorted(keys, wanted, sorter=order).clip(max=len(keys) - 1)
    return np.where(keys[order[found]] == wanted, order[found], ABSENT)
