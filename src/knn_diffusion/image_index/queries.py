"""What people hand to a search, as what a search takes: vectors in any array, and texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from knn_diffusion.errors import UsageError

Vectors = np.ndarray | Tensor | Sequence[float] | Sequence[Sequence[float]] | Sequence[np.ndarray]
"""One vector, or a row for each of several."""


def as_vectors(given: object) -> Float[np.ndarray, "queries dim"]:
    """A row for each query. Raises: UsageError for what is no numbers, or has more than two axes."""
    try:
        array = given.detach().float().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    except (ValueError, TypeError):  # rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
        got = f"{array.dtype} of shape {array.shape}" if array.dtype != object else type(given).__name__
        raise UsageError(
            f"expected vectors of numbers, one or a row for each query, got {got}: encode the queries first"
        )
    rows = array if array.ndim == 2 else array[None]
    return rows if rows.dtype.kind == "f" else rows.astype(np.float32)


def as_texts(given: object) -> list[str]:
    """The texts. Raises: UsageError for what is no text, or no valid one."""
    texts: list[Any] = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"expected texts to search by, got {type(text).__name__}: describe the image in words")
        try:
            text.encode()
        except UnicodeEncodeError:
            shown = text.encode("utf-8", "backslashreplace").decode()
            raise UsageError(f"expected a text in UTF-8, got {shown!r}: check the terminal's encoding") from None
    return texts
