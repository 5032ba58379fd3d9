"""Images in units that are tokenized as a whole: a shard, a table, or some loose files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from typing import TypeVar

from knn_diffusion.errors import UsageError
from knn_diffusion.images import ImageFile, SourceImage, is_container

T = TypeVar("T")

UNIT_FILES = 4096
"""At most so many loose files."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Files whose images belong together, and a name that changes when one of them does; opened when asked for images."""

    name: str
    files: Sequence[str]
    """Absolute paths."""
    open: Callable[[], Sequence[SourceImage]] = field(repr=False, compare=False)


def units_of(files: Iterable[ImageFile]) -> list[Unit]:
    """Cut files into units, in their order: each shard and table is one, and so are loose files between them.

    So a shard that is added, or that changed, leaves the units of all others as they are.
    """
    units = []
    for container, group in groupby(files, lambda one: one.path if is_container(one.path) else ""):
        for some in _pieces(list(group), bool(container)):
            paths = dict.fromkeys(one.path for one in some)
            units.append(_unit(list(paths), partial(_opened, some)))
    return units


def units_of_images(found: Sequence[SourceImage]) -> list[Unit]:
    """The same units for the images that were found in such files.

    Raises: UsageError for pictures that lie in no file, as nobody could tell later whether they are the same.
    """
    units = []
    for container, group in groupby(found, lambda one: one.file if is_container(one.file) else ""):
        for some in _pieces(list(group), bool(container)):
            if nowhere := [one.source for one in some if not one.file]:
                raise UsageError(
                    f"expected files to tokenize, got {nowhere[0]}: save the pictures and name their folder"
                )
            units.append(_unit(list(dict.fromkeys(one.file for one in some)), partial(list, some)))
    return units


def _pieces(group: list[T], whole: bool) -> list[list[T]]:
    size = len(group) if whole else UNIT_FILES
    return [group[start : start + size] for start in range(0, len(group), size)]


def _unit(files: Sequence[str], images: Callable[[], Sequence[SourceImage]]) -> Unit:
    paths = [os.path.abspath(file) for file in files]
    digest = hashlib.sha256("\n".join(map(_stamped, paths)).encode("utf-8", "backslashreplace"))
    return Unit(digest.hexdigest()[:24], paths, images)


def _opened(files: Sequence[ImageFile]) -> list[SourceImage]:
    return list(chain.from_iterable(file.images() for file in files))


def _stamped(path: str) -> str:
    """Place, size and time of a file."""
    try:
        status = os.stat(path)
    except OSError:
        return f"{path} missing"
    return f"{path} {status.st_size} {status.st_mtime_ns}"
