"""Vectors in .npy files, as clip-retrieval, autofaiss and plain NumPy write them: found, verified, read in pieces.

    img_emb/img_emb_0.npy   metadata/metadata_0.parquet   text_emb/…   image.index      a folder of clip-retrieval
    embeddings.npy   ids.txt   provenance.jsonl                                         a folder of our plain export
    any.npy others.npy                                                                  vectors alone

Files of embeddings and of metadata belong together by the number in their names. Other people's `image.index` is not read:
a search index is derived from the vectors, and a damaged one would answer wrongly without a word.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from knn_diffusion.config import from_dict, read_mapping
from knn_diffusion.errors import ConfigError, FingerprintError, StoreError, UsageError
from knn_diffusion.retrieval.interchange.tables import Provenance, count_rows, map_npy, read_rows
from knn_diffusion.retrieval.store import EncoderIdentity

IMAGE_FOLDERS = ("img_emb", "images")
"""Where the image embeddings of clip-retrieval lie, and those of LAION's releases."""
EMBEDDINGS_FILE, IDS_FILE, PROVENANCE_FILE = "embeddings.npy", "ids.txt", "provenance.jsonl"
ENCODER_FILE = "encoder.json"
"""Which encoder made the vectors, in folders that we export."""

CURES = {
    ".index": "faiss knows no images, save its vectors: numpy.save('vectors.npy', index.reconstruct_n(0, index.ntotal))",
    ".parquet": "save its column of vectors with numpy.save, and name the table with --provenance",
}
"""What to do with files that hold vectors in other ways."""

Sources = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of vectors, and the table that says where they came from."""

    path: Path
    num_rows: int
    table: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorFiles:
    """Vectors in files, laid end to end, of which only headers have been read."""

    shards: tuple[Shard, ...]
    dim: int
    ids: Path | None = None
    """Ids of all rows, instead of those in tables."""
    provenance: Path | None = None
    """A table of all rows, instead of one for each shard."""
    encoder: EncoderIdentity | None = None
    """The encoder that the folder itself names."""

    @property
    def num_rows(self) -> int:
        """Vectors in all files."""
        return sum(shard.num_rows for shard in self.shards)

    def digest(self) -> str:
        """Changes when a file is added, exchanged or written again."""
        extra = [path for path in (self.ids, self.provenance) if path is not None]
        tables = [shard.table for shard in self.shards if shard.table is not None]
        files = [*(shard.path for shard in self.shards), *tables, *extra]
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def vectors(self, start: int, stop: int) -> Float[np.ndarray, "rows dim"]:
        """Some of the vectors, copied from the mapped files."""
        parts, first = [], 0
        for shard in self.shards:
            inside = slice(max(start - first, 0), max(min(stop - first, shard.num_rows), 0))
            if inside.start < inside.stop:
                parts.append(map_vectors(shard.path)[inside])
            first += shard.num_rows
        return np.concatenate(parts)

    def rows(self, start: int) -> Iterator[Provenance]:
        """What is known of each vector from row `start` on; always with a source."""
        told = read_rows(self.provenance, start) if self.provenance is not None else self._told_by_shards(start)
        named: Iterator[Provenance] = (
            read_rows(self.ids, start) if self.ids is not None else itertools.repeat(Provenance())
        )
        for row, place, given in zip(told, self._places(start), named, strict=False):
            source = row.source if row.source is not None else place
            yield row._replace(source=source, id=given.id or row.id)

    def _told_by_shards(self, start: int) -> Iterator[Provenance]:
        for shard, skipped in self._shards_from(start):
            if shard.table is not None:
                yield from read_rows(shard.table, skipped, ids=False)
            else:
                yield from itertools.repeat(Provenance(), shard.num_rows - skipped)

    def _places(self, start: int) -> Iterator[str]:
        for shard, skipped in self._shards_from(start):
            yield from (f"{shard.path.name}::{row}" for row in range(skipped, shard.num_rows))

    def _shards_from(self, start: int) -> Iterator[tuple[Shard, int]]:
        """The shards that reach beyond row `start`, and how many rows of each lie before it."""
        first = 0
        for shard in self.shards:
            if first + shard.num_rows > start:
                yield shard, max(start - first, 0)
            first += shard.num_rows


def find_vectors(
    sources: Sources, *, ids: str | Path | None = None, provenance: str | Path | None = None
) -> VectorFiles:
    """The vectors in a folder, or in one or several .npy files; wildcards are expanded.

    Args:
        ids: a .txt file with one id a line, or a .npy file of strings or whole numbers.
        provenance: a .parquet or .jsonl table with a row for each vector, in their order.

    Raises: UsageError when there is nothing, or no such file; FingerprintError when files differ in width; StoreError when
        a file is damaged, no array of numbers, or a table has another number of rows.
    """
    paths = _expanded([sources] if isinstance(sources, str | Path) else sources)
    given = _in_folder(paths[0]) if len(paths) == 1 and paths[0].is_dir() else _of_files(paths)
    found = {path: table for path, table in given.items() if not _is_empty(path)}
    if not found:
        raise StoreError(f"expected vectors in {next(iter(given))}, found none in {len(given)} files: save some")
    beside = paths[0] if paths[0].is_dir() and paths[0] / EMBEDDINGS_FILE in found else None
    shards = tuple(_shard(path, table) for path, table in found.items())
    files = VectorFiles(
        shards=shards,
        dim=_common_width(shards),
        ids=Path(ids) if ids is not None else _there(beside, IDS_FILE),
        provenance=Path(provenance) if provenance is not None else _there(beside, PROVENANCE_FILE),
        encoder=_encoder_of(paths[0]),
    )
    for path in (files.ids, files.provenance):
        if path is not None:
            _check_count(path, files.num_rows, f"the {files.num_rows} vectors")
    return files


def map_vectors(path: Path) -> Float[np.ndarray, "rows dim"]:
    """The vectors of a .npy file, mapped. Raises: StoreError when it is damaged or holds anything else."""
    found = map_npy(path)
    if found.ndim != 2 or found.dtype.kind != "f" or found.dtype.itemsize > 8:
        raise StoreError(
            f"{path}: expected float16 or float32 vectors as rows, got {found.dtype} of shape {found.shape}: save them so"
        )
    return found


def _expanded(sources: Sequence[str | Path]) -> list[Path]:
    paths: list[Path] = []
    for source in sources:
        matches = [str(source)] if Path(source).exists() else sorted(glob.glob(str(source)))
        if not matches:
            raise UsageError(f"expected embeddings, {source} does not exist: check the path")
        paths += [Path(match) for match in matches]
    if not paths:
        raise UsageError("expected embeddings to import, got no path: name a folder or .npy files")
    return paths


def _of_files(paths: list[Path]) -> dict[Path, Path | None]:
    for path in paths:
        if path.is_dir():
            raise UsageError(
                f"expected one folder or any number of .npy files, got {path} and more: import it by itself"
            )
        if path.suffix.lower() != ".npy":
            cure = CURES.get(path.suffix.lower(), "save the vectors with numpy.save")
            raise UsageError(f"expected a folder or .npy files of vectors, got {path}: {cure}")
    return dict.fromkeys(paths)


def _in_folder(folder: Path) -> dict[Path, Path | None]:
    """The files of vectors in a folder and the table of each, in the order of their numbers."""
    if folder.name in IMAGE_FOLDERS and (numbered := _numbered(folder, "img_emb_", ".npy")):
        return _with_metadata(folder.parent, numbered)
    for name in IMAGE_FOLDERS:
        if numbered := _numbered(folder / name, "img_emb_", ".npy"):
            return _with_metadata(folder, numbered)
    if (folder / EMBEDDINGS_FILE).is_file():
        return {folder / EMBEDDINGS_FILE: None}
    named = (path for path in folder.iterdir() if path.suffix.lower() == ".npy" and path.stem != "ids")
    found = sorted(named, key=_natural)
    if not found:
        hint = " (text embeddings are no images)" if (folder / "text_emb").is_dir() else ""
        raise UsageError(
            f"expected img_emb/img_emb_*.npy or *.npy in {folder}, found none{hint}: name the folder that holds them"
        )
    return dict.fromkeys(found)


def _with_metadata(folder: Path, numbered: dict[int, Path]) -> dict[Path, Path | None]:
    tables = _numbered(folder / "metadata", "metadata_", ".parquet")
    if not tables:
        return {path: None for _, path in sorted(numbered.items())}
    if alone := sorted(numbered.keys() ^ tables.keys()):
        lonely = numbered.get(alone[0]) or tables[alone[0]]
        missing = "metadata" if alone[0] in numbered else "embeddings"
        raise StoreError(
            f"expected embeddings and metadata in pairs, {lonely} has no {missing} of its number "
            f"({len(alone)} such files): copy the missing files or take these away"
        )
    return {path: tables[number] for number, path in sorted(numbered.items())}


def _numbered(folder: Path, before: str, after: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{before}*{after}")):
        number = path.name.removeprefix(before).removesuffix(after)
        if not number.isdecimal():
            continue
        if int(number) in found:
            raise StoreError(f"expected one file of each number, found {found[int(number)]} and {path}: take one away")
        found[int(number)] = path
    return found


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts part10 after part9."""
    words = re.split(r"([0-9]+)", path.name)
    return [(1, int(word), "") if word.isdecimal() else (0, 0, word) for word in words]


def _is_empty(path: Path) -> bool:
    """Whether the file holds no vector, of whatever shape: a shard of which no image could be had."""
    try:
        with path.open("rb") as file:
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, _ = read[np.lib.format.read_magic(file)](file)
    except (OSError, ValueError, KeyError):
        return False  # what is wrong with it is said when it is read
    return len(shape) > 0 and shape[0] == 0


def _shard(path: Path, table: Path | None) -> Shard:
    num_rows = len(map_vectors(path))
    if table is not None:
        _check_count(table, num_rows, f"the {num_rows} vectors of {path.name}")
    return Shard(path=path, num_rows=num_rows, table=table)


def _check_count(table: Path, num_rows: int, what: str) -> None:
    if (count := count_rows(table)) != num_rows:
        raise StoreError(f"{table}: expected a row for each of {what}, got {count}: the files do not belong together")


def _common_width(shards: Sequence[Shard]) -> int:
    widths = {shard.path: int(map_vectors(shard.path).shape[1]) for shard in shards}
    first = shards[0].path
    for path, width in widths.items():
        if width != widths[first]:
            raise FingerprintError(
                f"{path} has vectors of {width} numbers, {first} of {widths[first]}: they come of different encoders, "
                "import them into different indexes"
            )
    if not widths[first]:
        raise StoreError(f"{first}: expected vectors of at least one number, got none: save them so")
    return widths[first]


def _there(folder: Path | None, name: str) -> Path | None:
    return folder / name if folder is not None and (folder / name).is_file() else None


def _encoder_of(folder: Path) -> EncoderIdentity | None:
    path = folder / ENCODER_FILE
    if not path.is_file():
        return None
    try:
        return from_dict(EncoderIdentity, read_mapping(path), source=str(path))
    except ConfigError as error:
        raise StoreError(f"expected the encoder of the vectors, got {error}: mend the file or take it away") from None
