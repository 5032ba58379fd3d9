"""What a query may not find, as ids of images: the same for all queries, or for each its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from knn_diffusion.errors import UsageError

Excluded = Collection[str] | Sequence[Collection[str]]
"""Ids that no query may find, or for each query the ids it may not find."""


def per_query(excluded: object, count: int) -> list[list[str]] | None:
    """The excluded ids of each query, None when there are none.

    Raises: UsageError for one id that is in no list, which would be taken letter by letter.
    """
    if excluded is None:
        return None
    every = [] if isinstance(excluded, str) or not isinstance(excluded, Iterable) else list(excluded)
    alone = [one for one in every if isinstance(one, str)]
    listed = all(isinstance(one, Iterable) for one in every)
    if isinstance(excluded, str) or not isinstance(excluded, Iterable) or not listed or 0 < len(alone) < len(every):
        raise UsageError(
            f"expected exclude_ids as ids, or for each query a list of ids, got {shortened(excluded)}: put each id in a list"
        )
    return [[str(one) for one in alone]] * count if alone or not every else [list(one) for one in every]


def require_list(ids: object) -> None:
    """Raise UsageError for one id in the place of several."""
    if isinstance(ids, str):
        raise UsageError(f"expected a list of ids, got the text {shortened(ids)}: put it in a list")


def shortened(value: object) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
