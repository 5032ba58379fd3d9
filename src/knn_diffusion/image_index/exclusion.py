"""What a query may not find, as ids of images: the same for all queries, or for each its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
