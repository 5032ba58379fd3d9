"""Where images come from: folders, files, tar shards, parquet tables. Found now, decoded when asked for."""

from __future__ import annotations

import functools
import glob
import os
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from knn_diffusion.errors import ImageError, MissingDependencyError, UsageError
from knn_diffusion.images.decode import MAX_FILE_BYTES, one_line, open_image

SUFFIXES = frozenset((".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
NOT_READ = frozenset((".heic", ".heif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw"))
"""Pictures in folders that are listed as unusable, so that nobody misses them without a word."""
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
"""Archives that are listed likewise: no member of them can be read at its offset."""
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image that was found but not yet read.

    source: where it lies, unique: a path, `shard.tar::member` or `table.parquet::row`; key: its name within what was
    asked for; load: decodes it, or raises ImageError; file: the one it lies in, empty for a picture in memory.
    """

    source: str
    key: str
    load: Callable[[], Image.Image] = field(repr=False, compare=False)
    file: str = ""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file that was found but not yet opened: a picture, or a shard or table of pictures.

    path: where it lies; key: its name within what was asked for; problem: why nothing of it can be used.
    """

    path: str
    key: str
    problem: str = ""

    def images(self) -> Iterator[SourceImage]:
        """The pictures in it, or one that fails to load where the file is of no use."""
        place = Path(self.path)
        if self.problem:
            yield _failing(self.path, self.problem)
        elif place.suffix.lower() == ".tar":
            yield from _images_of_shard(place)
        elif place.suffix.lower() == ".parquet":
            yield from _images_of_table(place)
        else:
            yield SourceImage(self.path, self.key, functools.partial(open_image, place), self.path)


def is_container(path: str) -> bool:
    """Whether a file of this name holds many pictures."""
    return Path(path).suffix.lower() in (".tar", ".parquet")


def find_images(paths: Sequence[str | Path]) -> list[SourceImage]:
    """Every image of the folders (recursively, in sorted order), files, wildcards, tar shards and parquet tables.

    In folders, shards and tables, what is no image by its name is passed over; so are hidden files, links in shards, and the tables
    without images that img2dataset writes beside its shards. A damaged shard or table, a folder that may not be read and a file of a
    format that is not read appear as images that fail to load, so that a job over many can list them and go on.

    Raises: UsageError when a path does not exist or nothing is found; MissingDependencyError for parquet without pyarrow.
    """
    found: dict[str, SourceImage] = {}
    for file in find_files(paths):
        for image in file.images():
            found.setdefault(image.source, image)
    if not found:
        raise _nothing_found(paths)
    return list(found.values())


def find_files(paths: Sequence[str | Path]) -> list[ImageFile]:
    """As `find_images`, without opening a shard or a table.

    Raises: UsageError when a path does not exist or nothing is found.
    """
    found: dict[str, ImageFile] = {}
    for path in paths:
        for place in _expanded(path):
            for file in _files_at(place):
                found.setdefault(file.path, file)
    if not found:
        raise _nothing_found(paths)
    return list(found.values())


def _nothing_found(paths: Sequence[str | Path]) -> UsageError:
    named = one_line(", ".join(str(path) for path in paths))
    return UsageError(
        f"expected images ({', '.join(sorted(SUFFIXES))}), found none in {named or 'no path'}: check the paths"
    )


def _expanded(path: str | Path) -> list[Path]:
    if os.path.exists(path):
        return [Path(path)]
    matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
    if not matches:
        raise UsageError(f"expected images, {one_line(path)} does not exist: check the path")
    return [Path(match) for match in matches]


def _files_at(place: Path) -> Iterator[ImageFile]:
    if place.is_dir():
        closed = list[OSError]()
        for file in _files_below(place, closed.append):
            yield ImageFile(str(file), str(file.relative_to(place)), _problem(file))
        for error in closed:
            reason = f"{one_line(error.filename)} cannot be read ({error.strerror}): change its permissions"
            yield ImageFile(str(error.filename), Path(error.filename).name, reason)
    elif place.is_file():
        yield ImageFile(str(place), place.name, _problem(place))
    else:
        raise UsageError(f"expected a file or a folder, {one_line(place)} is neither: check the path")


def _files_below(folder: Path, closed: Callable[[OSError], object]) -> Iterator[Path]:
    known = (*SUFFIXES, *NOT_READ, *PACKED, ".tar", ".parquet")
    for parent, folders, files in os.walk(folder, onerror=closed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(parent, name)
            if not name.startswith(".") and name.lower().endswith(known) and file.is_file():
                yield file


def _problem(file: Path) -> str:
    """Why a file is of no use by its name, empty when it may be of use."""
    if file.suffix.lower() in NOT_READ:
        return f"{one_line(file)} is of a format that is not read: save it as PNG or JPEG"
    if file.name.lower().endswith(PACKED):
        return f"{one_line(file)} is packed: unpack it to a .tar or a folder"
    return ""


def _failing(source: str, reason: str) -> SourceImage:
    return SourceImage(source, Path(source).name, functools.partial(_refuse, reason), source)


def _refuse(reason: str) -> Image.Image:
    raise ImageError(reason)


def _images_of_shard(shard: Path) -> Iterator[SourceImage]:
    """Members are only read, at their offsets, never unpacked; so a hostile name is merely a name."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse() and Path(member.name).suffix.lower() in SUFFIXES:
                    load = functools.partial(_load_member, shard, member.name, member.offset_data, member.size)
                    yield SourceImage(f"{shard}::{member.name}", member.name, load, str(shard))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        reason = (
            f"expected an uncompressed tar shard, {one_line(shard)} is damaged ({one_line(error)}): get an intact copy"
        )
        yield _failing(str(shard), reason)


def _load_member(shard: Path, name: str, offset: int, size: int) -> Image.Image:
    label = one_line(f"{shard}::{name}")
    if size > MAX_FILE_BYTES:
        raise ImageError(f"expected a file of at most {MAX_FILE_BYTES // 10**6} MB, {label} is larger: make it smaller")
    try:
        with shard.open("rb") as stream:
            stream.seek(offset)
            return _decode_member(stream.read(size), label)
    except OSError as error:
        raise ImageError(f"expected a tar shard, {label} cannot be read ({error.strerror}): check the file") from None


def _decode_member(content: bytes, label: str) -> Image.Image:
    try:
        return open_image(content)
    except ImageError as error:
        raise ImageError(str(error).replace("the given image", label)) from None


def _images_of_table(table: Path) -> Iterator[SourceImage]:
    parquet = _pyarrow_parquet()
    try:
        with parquet.ParquetFile(table) as opened:
            column = _image_column(opened.schema_arrow)
            groups = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
    except (OSError, ValueError) as error:
        reason = f"expected a parquet table, {one_line(table)} is damaged ({one_line(error)[:200]}): get an intact copy"
        yield _failing(str(table), reason)
        return
    if column is None and table.with_suffix(".tar").is_file():
        return  # facts about the images of that shard
    if column is None:
        reason = (
            f"expected a column of images ({', '.join(IMAGE_COLUMNS)}), {one_line(table)} has none: rename its column"
        )
        yield _failing(str(table), reason)
        return
    number = 0
    for group, count in enumerate(groups):
        for row in range(count):
            load = functools.partial(_load_row, table, column, group, row, number)
            yield SourceImage(f"{table}::{number}", str(number), load, str(table))
            number += 1


def _pyarrow_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingDependencyError(
            "expected pyarrow to read parquet tables, it is missing: pip install knn-diffusion[parquet]"
        ) from None
    return parquet


def _image_column(schema: Any) -> str | None:
    """The first column by a usual name that holds bytes, plain or as {bytes, path}."""
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = str(schema.field(name).type)
            if "binary" in kind:
                return name
    return None


_ROW_GROUPS = threading.Lock()


@functools.lru_cache(maxsize=2)
def _row_group(table: Path, column: str, group: int) -> Any:
    with _pyarrow_parquet().ParquetFile(table) as opened:
        return opened.read_row_group(group, columns=[column]).column(column)


def _load_row(table: Path, column: str, group: int, row: int, number: int) -> Image.Image:
    label = one_line(f"{table}::{number}")
    try:
        with _ROW_GROUPS:  # or every thread would read the group
            values = _row_group(table, column, group)
        value = values[row].as_py()
    except (OSError, ValueError) as error:
        raise ImageError(
            f"expected a parquet table, {label} cannot be read ({one_line(error)[:200]}): get an intact copy"
        ) from None
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise ImageError(f"expected the bytes of an image, {label} holds none: embed the images in the table")
    return _decode_member(content, label)
