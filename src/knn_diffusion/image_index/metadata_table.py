"""Tables of metadata beside images, and which of their rows tells of which image.

A row names its image in the column `source` or `file_name` (a path, relative to the table or not, or a file name), or in `key`
(a member of a tar shard, with or without its ending). Rows of a parquet table that holds the images itself tell of those.
"""

from __future__ import annotations

import csv
import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knn_diffusion.errors import UsageError
from knn_diffusion.images import SourceImage
from knn_diffusion.retrieval.interchange.tables import read_objects
from knn_diffusion.retrieval.metadata import Value, scalars

Tables = str | Path | Sequence[str | Path]
SOURCE_COLUMNS, KEY_COLUMN = ("source", "file_name"), "key"
_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(\.\d*)?(?:[eE][+-]?\d+)?|[+-]?\.\d+(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"-?(?:0|[1-9]\d*)", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """What tables tell of images, by their sources, and how many rows tell of none, or of several."""

    metadata: Mapping[str, Mapping[str, Value]]
    unmatched: int = 0


def match_tables(tables: Tables, images: Sequence[SourceImage]) -> Matched:
    """What the tables tell of the images.

    Args:
        tables: .csv, .jsonl or .parquet files, or wildcards. Numbers of a CSV become numbers where the whole column is
            numeric; lists and other things of more than one value are left out.

    Raises: UsageError when a table is missing, of another kind, names no images, or tells of one twice; StoreError when it
        is damaged.
    """
    places, found, unmatched = _Places(images), dict[str, Mapping[str, Value]](), 0
    for path in _expanded([tables] if isinstance(tables, str | Path) else tables):
        for number, row in enumerate(_rows(path)):
            source = places.of(path, number, row)
            if source is None:
                unmatched += 1
            elif source in found:
                raise UsageError(f"expected one row for each image, {path} has another for {source}: take one away")
            else:
                found[source] = scalars(row, (*SOURCE_COLUMNS, KEY_COLUMN))
    return Matched(metadata=found, unmatched=unmatched)


class _Places:
    """Images by everything that a row may call them; what several are called is nobody's."""

    def __init__(self, images: Sequence[SourceImage]) -> None:
        self._paths = _by_name((os.path.abspath(one.source), one.source) for one in images)
        self._names = _by_name((os.path.basename(one.source.rpartition("::")[2]), one.source) for one in images)
        self._keys = _by_name((name, one.source) for one in images for name in {one.key, os.path.splitext(one.key)[0]})

    def of(self, table: Path, number: int, row: Mapping[str, Any]) -> str | None:
        """The source of the row's image."""
        if (own := self._paths.get(f"{os.path.abspath(table)}::{number}")) is not None:
            return own
        if not row.keys() & {*SOURCE_COLUMNS, KEY_COLUMN}:
            raise UsageError(
                f"expected a column source or key that names the image, {table} has {', '.join(row) or 'none'}: rename one"
            )
        if name := next((str(row[column]) for column in SOURCE_COLUMNS if row.get(column)), ""):
            near, here = os.path.abspath(table.parent / name), os.path.abspath(name)
            return self._paths.get(near) or self._paths.get(here) or self._names.get(name)
        return self._keys.get(str(row.get(KEY_COLUMN)))


def _by_name(pairs: Iterator[tuple[str, str]]) -> dict[str, str | None]:
    named = defaultdict[str, list[str]](list)
    for name, source in pairs:
        named[name].append(source)
    return {name: sources[0] if len(sources) == 1 else None for name, sources in named.items()}


def _expanded(tables: Sequence[str | Path]) -> Iterator[Path]:
    for table in tables:
        matches = [str(table)] if os.path.exists(table) else sorted(glob.glob(str(table)))
        if not matches:
            raise UsageError(f"expected a table of metadata, {table} does not exist: check the path")
        yield from map(Path, matches)


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path)
    elif path.suffix in (".jsonl", ".parquet"):
        yield from read_objects(path)
    else:
        raise UsageError(f"expected a .csv, .jsonl or .parquet table of metadata, got {path}: convert it")


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows without their empty fields; read twice, first to learn which columns are numbers."""
    kinds: dict[str, type[Value]] = {}
    for row in _csv_texts(path):
        for name, value in row.items():
            kinds[name] = _wider(kinds.get(name, int), value)
    whole = (*SOURCE_COLUMNS, KEY_COLUMN)
    for row in _csv_texts(path):
        yield {
            name: value if name in whole else kinds[name](value)
            for name, value in row.items()
            if value or name in whole
        }


def _wider(kind: type[Value], value: str) -> type[Value]:
    """The type that holds the values so far and this one."""
    if kind is str or not value or (kind is int and _WHOLE.fullmatch(value)):
        return kind
    return float if _NUMBER.fullmatch(value) else str


def _csv_texts(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            if not (header := next(reader, [])):
                raise UsageError(f"expected a line that names the columns of {path}, it is empty: write one")
            if len(set(header)) < len(header):
                raise UsageError(f"expected columns of different names, got {', '.join(header)} in {path}: rename one")
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise UsageError(
                        f"{path}, line {reader.line_num}: expected {len(header)} fields, got {len(fields)}: mend the line"
                    )
                if fields:
                    yield dict(zip(header, fields, strict=True))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"expected a CSV table in UTF-8, {path} is none ({error}): save it so") from None
