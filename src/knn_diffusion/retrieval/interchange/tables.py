"""Tables that say where vectors came from, one row each: parquet, JSON lines, a list of ids. Read a row at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knn_diffusion.config import parse_json
from knn_diffusion.errors import MissingDependencyError, StoreError, UsageError
from knn_diffusion.retrieval.database import text
from knn_diffusion.retrieval.metadata import scalars

CONTENT_COLUMN = "content_sha256"
"""Written by our exports only: what stands for the content of the image."""
SOURCE_COLUMNS = ("source", "url", "image_path", "path", "file_name")
"""Where an image came from: of these columns the first that is not empty."""
KEY_COLUMNS = ("key", "image_path")
"""The image's name inside its data set: the first of these columns that is there."""
OWN_COLUMNS = ("id", CONTENT_COLUMN, *SOURCE_COLUMNS, "key")
"""All others are metadata."""
_READ_ROWS = 4096


class Provenance(NamedTuple):
    """What a table says of one vector. Empty is what it leaves open; None is a source of which it says nothing at all."""

    id: str = ""
    source: str | None = None
    key: str = ""
    content: str = ""
    metadata: Mapping[str, Any] = {}


def count_rows(path: Path) -> int:
    """Rows of a table or a list of ids.

    Raises: UsageError when it is missing or of another kind; StoreError when it is damaged.
    """
    _check(path)
    if path.suffix == ".parquet":
        with _opened(path) as table:
            return int(table.metadata.num_rows)
    if path.suffix == ".npy":
        return len(_id_array(path))
    with path.open("rb") as file:
        ends, last = 0, b"\n"
        while block := file.read(2**20):
            ends, last = ends + block.count(b"\n"), block[-1:]
    return ends + (last != b"\n")


def read_rows(path: Path, start: int = 0, *, ids: bool = True) -> Iterator[Provenance]:
    """The rows of a table or a list of ids, from row `start` on.

    Args:
        ids: take the column `id` for ids even when the table is none of ours; in other people's it need not be unique.

    Raises: StoreError, at the row, when the table is damaged.
    """
    _check(path)
    if path.suffix == ".npy":
        yield from (Provenance(id=_word(value)) for value in _id_array(path)[start:])
    elif path.suffix == ".txt":
        yield from (Provenance(id=text(line)) for _, line in _lines(path, start))
    else:
        yield from (_of_row(row, ids) for row in read_objects(path, start))


def read_objects(path: Path, start: int = 0) -> Iterator[Mapping[str, Any]]:
    """The rows of a parquet or JSON lines table as objects, from row `start` on; of parquet only columns of single values.

    Raises: UsageError when it is missing or of another kind; StoreError, at the row, when it is damaged.
    """
    _check(path)
    if path.suffix == ".parquet":
        yield from islice(_parquet_objects(path), start, None)
    else:
        yield from (_json_object(path, number, line) for number, line in _lines(path, start))


def map_npy(path: Path) -> np.ndarray:
    """The array in a .npy file, mapped; archives and pickles, which numpy.load would open, are not.

    Raises: StoreError when the file is damaged or of another kind.
    """
    try:
        with np.errstate(all="raise"):  # a size beyond all numbers would only warn, and wrap around
            return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, ArithmeticError) as error:
        raise _damaged(path, error) from None


def _check(path: Path) -> None:
    if path.suffix not in (".parquet", ".jsonl", ".txt", ".npy"):
        raise UsageError(f"expected a .parquet, .jsonl, .txt or .npy file, got {path}: convert it")
    if not path.is_file():
        raise UsageError(f"expected a table, {path} does not exist: check the path")


def _lines(path: Path, start: int) -> Iterator[tuple[int, str]]:
    """Lines with their numbers. Only a line feed ends one: Python's own way would also split at one inside an id."""
    with path.open(encoding="utf-8-sig", errors="backslashreplace", newline="\n") as file:
        for number, line in enumerate(islice(file, start, None), start + 1):
            yield number, line.rstrip("\r\n")


def _json_object(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise StoreError(f"{path}, line {number}: expected a JSON object ({error}): mend the line") from None
    if not isinstance(row, dict):
        raise StoreError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}: mend the line")
    return row


def _parquet_objects(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with _opened(path) as table:
            wanted = [field.name for field in table.schema_arrow if field.name in OWN_COLUMNS or _is_single(field.type)]
            if not wanted:
                yield from ({} for _ in range(table.metadata.num_rows))
                return
            for batch in table.iter_batches(batch_size=_READ_ROWS, columns=wanted):
                yield from _of_batch(batch, wanted)
    except (OSError, ValueError, TypeError, ArithmeticError) as error:
        raise _damaged(path, error) from None


def _is_single(kind: Any) -> bool:
    from pyarrow import types

    return not types.is_nested(kind) and "binary" not in str(kind)


def _of_batch(batch: Any, wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    names = list(batch.schema.names)
    columns = [batch.column(names.index(name)).to_pylist() for name in wanted]
    return (dict(zip(wanted, values, strict=True)) for values in zip(*columns, strict=True))


def _of_row(row: Mapping[str, Any], ids: bool) -> Provenance:
    content = _word(row.get(CONTENT_COLUMN))
    ours = re.fullmatch("[0-9a-f]{64}", content) is not None
    named = [_word(row[name]) for name in SOURCE_COLUMNS if name in row]
    return Provenance(
        id=_word(row.get("id")) if ids or ours else "",
        source=next(filter(None, named), "") if named else None,
        key=next((_word(row[name]) for name in KEY_COLUMNS if name in row), ""),
        content=content if ours else "",
        metadata=scalars(row, OWN_COLUMNS, gaps=not ours),
    )


def _word(value: object) -> str:
    """A field as text that a database can hold."""
    if value is None or value != value:  # noqa: PLR0124 — only a number that is none differs from itself
        return ""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else text(str(value))


def _id_array(path: Path) -> np.ndarray:
    found = map_npy(path)
    if found.ndim != 1 or found.dtype.kind not in "USiu":
        raise StoreError(
            f"{path}: expected a list of strings or whole numbers, got {found.dtype} of shape {found.shape}: save it so"
        )
    return found


def _opened(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingDependencyError(
            "expected pyarrow to read and write parquet tables, it is missing: pip install knn-diffusion[parquet]"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> StoreError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return StoreError(f"{path} is damaged or of another kind ({reason}): get an intact copy")
