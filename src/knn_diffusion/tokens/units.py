"""Images in units that are tokenized as a whole: a shard, a table, or some loose files."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeVar

from knn_diffusion.errors import UsageError
from knn_diffusion.images import ImageFile, SourceImage, is_container

T = TypeVar("T")

UNIT_FILES, CUT = 4096, 1024
"""At most so many loose files; and behind one in so many, chosen by its name, is a cut."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Files whose images belong together, and a name that changes when one of them does; opened when asked for images."""

    name: str
    files: Sequence[str]
    """Absolute paths."""
    open: Callable[[], Sequence[SourceImage]] = field(repr=False, compare=False)


def units_of(files: Iterable[ImageFile]) -> list[Unit]:
    """Cut files into units: each shard and table is one, and so are some loose files.

    So a shard that is added, or that changed, leaves the units of all others as they are.
    """
    return _cut([(one.path, one) for one in files], _opened)


def units_of_images(found: Sequence[SourceImage]) -> list[Unit]:
    """The same units for the images that were found in such files.

    Raises: UsageError for pictures that lie in no file, as nobody could tell later whether they are the same.
    """
    if nowhere := [one.source for one in found if not one.file]:
        raise UsageError(f"expected files to tokenize, got {nowhere[0]}: save the pictures and name their folder")
    return _cut([(one.file, one) for one in found], list)


def _cut(found: Sequence[tuple[str, T]], opened: Callable[[Sequence[T]], Sequence[SourceImage]]) -> list[Unit]:
    """Units in the order of their first files. Loose files are one sequence, wherever shards lie between them.

    It is cut behind files that their names choose, so that one more file moves no cut but those next to it.
    """
    units = list[tuple[list[str], list[T]]]()
    shards = dict[str, list[T]]()
    loose: tuple[list[str], list[T]] | None = None
    for file, one in found:
        if is_container(file):
            if file not in shards:
                shards[file] = []
                units.append(([file], shards[file]))
            shards[file].append(one)
            continue
        if loose is None:
            loose = [], []
            units.append(loose)
        loose[0].append(file)
        loose[1].append(one)
        if len(loose[0]) == UNIT_FILES or zlib.crc32(os.fsencode(os.path.abspath(file))) % CUT == 0:
            loose = None
    return [_unit(files, partial(opened, some)) for files, some in units]


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
