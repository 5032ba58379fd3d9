"""What a query may not find, as ids of images: the same for all queries, or for each its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Int

from knn_diffusion.retrieval.index import require_one_each
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

Excluded = Collection[str] | Sequence[Collection[str]]
"""Ids that no query may find, or for each query the ids it may not find."""


def per_query(excluded: Excluded | None, count: int) -> list[list[str]] | None:
    """The excluded ids of each query, None when there are none."""
    if excluded is None:
        return None
    every = list(excluded)
    if all(isinstance(one, str) for one in every):
        return [[str(one) for one in every]] * count
    return [list(one) for one in every]


def excluded_items(
    store: Store, snapshot: Snapshot, excluded: Excluded | None, count: int
) -> Int[np.ndarray, "queries most"]:
    """Places among the snapshot's images of those that each query may not find, filled with -1, also for unknown ids.

    Raises: UsageError when there are not as many lists as queries.
    """
    asked = per_query(excluded, count) or [[]] * count
    require_one_each(asked, count)
    rows = store.rows_of([one for ids in asked for one in ids], snapshot)
    table = np.full((count, max((len(ids) for ids in asked), default=0)), -1, np.int64)
    filled = np.arange(table.shape[1]) < np.array([len(ids) for ids in asked], np.int64)[:, None]
    table[filled] = np.where(rows >= 0, np.searchsorted(snapshot.live_rows, rows), -1)
    return table
