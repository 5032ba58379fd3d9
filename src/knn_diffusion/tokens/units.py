"""Images in units that are tokenized as a whole or not at all: a shard, a piece of a large one, or some files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from knn_diffusion.errors import UsageError
from knn_diffusion.images import SourceImage

UNIT_IMAGES = 4096
"""At most so many images; tokens and embeddings of a paper-sized image take 3 KB."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Images that lie together, and a name that changes when one of their files does."""

    name: str
    images: Sequence[SourceImage]


def units_of(found: Sequence[SourceImage]) -> list[Unit]:
    """Cut images into units, in their order: none reaches over the end of a shard or table.

    So a shard that is added, or that changed, leaves the units of all others as they are.

    Raises: UsageError for pictures that lie in no file, as nobody could tell later whether they are the same.
    """
    units = []
    for container, group in groupby(found, lambda one: "" if one.source == one.file else one.file):
        images = list(group)
        if nowhere := [one.source for one in images if not one.file]:
            raise UsageError(f"expected files to tokenize, got {nowhere[0]}: save the pictures and name their folder")
        for start in range(0, len(images), UNIT_IMAGES):
            units.append(_unit(container, start, images[start : start + UNIT_IMAGES]))
    return units


def _unit(container: str, start: int, images: Sequence[SourceImage]) -> Unit:
    lines = [f"{start} {len(images)}", _stamp(container)] if container else [_stamp(one.file) for one in images]
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "backslashreplace"))
    return Unit(digest.hexdigest()[:24], images)


def _stamp(file: str) -> str:
    """Place, size and time of a file."""
    path = os.path.abspath(file)
    try:
        status = os.stat(path)
    except OSError:
        return f"{path} missing"
    return f"{path} {status.st_size} {status.st_mtime_ns}"
