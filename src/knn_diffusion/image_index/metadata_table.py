"""Tables of metadata beside images, and which of their rows tells of which image.

A row names its image in the column `source` or `file_name` (a path, relative to the table or not, or a file name), or in `key`
(a member of a tar shard, with or without what follows its first or its last dot; a table called like a shard tells of that
shard alone). Rows of a parquet table that holds the images itself tell of those.
"""

from __future__ import annotations

import csv
import glob
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knn_diffusion.errors import UsageError
from knn_diffusion.images import SourceImage
from knn_diffusion.images.decode import one_line
from knn_diffusion.retrieval.interchange.tables import read_objects
from knn_diffusion.retrieval.metadata import Value, is_gap, scalars

Tables = str | Path | Sequence[str | Path]
SOURCE_COLUMNS, KEY_COLUMN = ("source", "file_name"), "key"
_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(\.\d*)?(?:[eE][+-]?\d+)?|[+-]?\.\d+(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"-?(?:0|[1-9]\d*)", re.ASCII)
_DIGITS = 19
"""A whole number of more may be beyond 64 bits; then its column holds texts, so that no digit is lost."""
GAPS_AMONG_NUMBERS = frozenset(("na", "none", "-", "?"))
"""What says in a column of numbers that nothing is known, while among texts it may be one."""
REASONS = 3
"""Rows that tell of no image are explained up to so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """What tables tell of images, by their sources, how many rows tell of none, or of several, and why some of these do."""

    metadata: Mapping[str, Mapping[str, Value]]
    unmatched: int = 0
    reasons: Sequence[str] = ()


def match_tables(tables: Tables, images: Sequence[SourceImage]) -> Matched:
    """What the tables tell of the images.

    Args:
        tables: .csv, .jsonl or .parquet files, or wildcards. Numbers of a CSV become numbers where the whole column is
            numeric; what says that nothing is known (nan, n/a, null) is left out, and so are lists.

    Raises: UsageError when a table is missing, of another kind, names no images, or tells of one twice; StoreError when it
        is damaged.
    """
    places, found, unmatched = _Places(images), dict[str, Mapping[str, Value]](), 0
    reasons = list[str]()
    for path in _expanded([tables] if isinstance(tables, str | Path) else tables):
        for number, row in enumerate(_rows(path)):
            named = places.of(path, number, row)
            if len(named) != 1:
                unmatched += 1
                if len(reasons) < REASONS:
                    reasons.append(f"row {number + 1} of {path}: {_reason(row, named)}")
            elif named[0] in found:
                raise UsageError(f"expected one row for each image, {path} has another for {named[0]}: take one away")
            else:
                found[named[0]] = scalars(row, (*SOURCE_COLUMNS, KEY_COLUMN), gaps=True)
    return Matched(metadata=found, unmatched=unmatched, reasons=reasons)


def _reason(row: Mapping[str, Any], named: Sequence[str]) -> str:
    called = next((str(row[column]) for column in (*SOURCE_COLUMNS, KEY_COLUMN) if row.get(column)), "")
    if not named:
        return one_line(f"no image is called {called!r}")
    return one_line(f"{called!r} could be {len(named)} images, such as {named[0]} and {named[1]}")


class _Places:
    """Images by everything that a row may call them."""

    def __init__(self, images: Sequence[SourceImage]) -> None:
        self._stems = {one.source: _stem(one.file) for one in images if one.source != one.file}
        self._shards = set(self._stems.values())
        self._paths = _ByName((os.path.abspath(one.source), one.source) for one in images)
        self._names = _ByName((os.path.basename(one.source.rpartition("::")[2]), one.source) for one in images)
        self._keys = _ByName((name, one.source) for one in images for name in _keys(one.key))

    def of(self, table: Path, number: int, row: Mapping[str, Any]) -> Sequence[str]:
        """The sources of the images that the row may tell of; it tells of one if there is exactly one."""
        if own := self._paths.find(f"{os.path.abspath(table)}::{number}"):
            return own
        if not row.keys() & {*SOURCE_COLUMNS, KEY_COLUMN}:
            raise UsageError(
                f"expected a column source or key that names the image, {table} has {', '.join(row) or 'none'}: rename one"
            )
        if name := next((str(row[column]) for column in SOURCE_COLUMNS if row.get(column)), ""):
            near, here = os.path.abspath(table.parent / name), os.path.abspath(name)
            found = self._paths.find(near) or self._paths.find(here) or self._names.find(name)
        else:
            found = self._keys.find(str(row.get(KEY_COLUMN)))
        if (stem := _stem(table)) in self._shards:  # the table of one shard
            return [one for one in found if self._stems.get(one) == stem]
        return found


def _stem(path: str | Path) -> str:
    return os.path.splitext(os.path.abspath(path))[0]


def _keys(key: str) -> set[str]:
    """What a member of a shard may be called: by its name, without its ending, or up to the first dot as webdataset does."""
    folder, slash, name = key.rpartition("/")
    return {key, os.path.splitext(key)[0], folder + slash + (name.partition(".")[0] or name)}


def _plain(name: str) -> str:
    """The name as other systems may have written it: letters with their accents joined, no ./ before it, slashes."""
    return re.sub(r"(^|::)(\./)+", r"\1", unicodedata.normalize("NFC", name).replace("\\", "/"))


class _ByName:
    """Sources by name: as it is written, else as another system may write it."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._written, self._plain = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        for name, source in pairs:
            for named, one in ((self._written, name), (self._plain, _plain(name))):
                if source not in named[one][-1:]:
                    named[one].append(source)

    def find(self, name: str) -> list[str]:
        return self._written.get(name) or self._plain.get(_plain(name)) or []


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
            if name in whole or not (is_gap(value) or (kinds[name] is not str and value.lower() in GAPS_AMONG_NUMBERS))
        }


def _wider(kind: type[Value], value: str) -> type[Value]:
    """The type that holds the values so far and this one."""
    if kind is str or is_gap(value) or value.lower() in GAPS_AMONG_NUMBERS:
        return kind
    if kind is int and _WHOLE.fullmatch(value):
        return int if len(value) < _DIGITS or -(2**63) <= int(value[: _DIGITS + 1]) < 2**63 else str
    return float if _NUMBER.fullmatch(value) else str


def _csv_texts(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
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
