"""A store as files that other tools read: the folder of clip-retrieval, or one .npy with ids and provenance beside it.

The folder is there as a whole or not at all, and holds what was not removed when the export began.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
from jaxtyping import Float16, Int

from knn_diffusion.checkpoint import atomic_folder, write_json
from knn_diffusion.errors import MissingDependencyError, StoreError, UsageError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.interchange.faiss_file import write_faiss
from knn_diffusion.retrieval.interchange.tables import CONTENT_COLUMN, OWN_COLUMNS
from knn_diffusion.retrieval.interchange.vector_files import EMBEDDINGS_FILE, ENCODER_FILE, IDS_FILE, PROVENANCE_FILE
from knn_diffusion.retrieval.metadata import Value, column_names, metadata_kinds
from knn_diffusion.retrieval.plan import IndexConfig
from knn_diffusion.retrieval.segments import SEGMENT_ROWS, CompactedError, Snapshot
from knn_diffusion.retrieval.store import Item, Store

SHARD_ROWS = 1_000_000
"""Vectors in one file, as clip-retrieval writes them."""
BATCH_ROWS = SEGMENT_ROWS

Layout = Literal["clip-retrieval", "npy"]
Kinds = Mapping[str, type[Value]]
Batches = Iterator[tuple[Float16[np.ndarray, "rows dim"], list[Item]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written: the folder, how many vectors in how many .npy files, and which faiss index, if any."""

    folder: str
    layout: str
    count: int
    dim: int
    files: int
    faiss: str | None


def export_vectors(
    store: Store,
    folder: Path,
    *,
    layout: Layout = "clip-retrieval",
    faiss: IndexConfig | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write everything that is not removed into a new folder.

    Args:
        layout: "clip-retrieval" is img_emb/*.npy with metadata/*.parquet, a million vectors each; "npy" is embeddings.npy
            with ids.txt and provenance.jsonl, and needs no pyarrow.
        faiss: also write a faiss index of these settings.

    Raises: UsageError when the folder exists or an id does not fit into a list of ids; StoreError when the index is empty
        or damaged; MissingDependencyError without pyarrow; KnnDiffusionError when the disk is full. Then nothing is left.
    """
    if layout not in get_args(Layout):
        raise UsageError(f"expected the format {' or '.join(get_args(Layout))}, got {layout!r}: choose one of them")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"expected a new folder for the export, {folder} exists: choose another")
    snapshot = store.snapshot()
    if not len(snapshot.live_rows):
        raise StoreError(f"{store.name} holds no images: add some before exporting")
    compacted = f"{store.name} was compacted during the export, nothing was written: export it again"
    with atomic_folder(folder) as temporary, _told_of_compaction(compacted):
        shards = list(_shards(snapshot)) if layout == "clip-retrieval" else [snapshot.live_rows]
        batches = _Batches(store, snapshot, progress)
        if layout == "clip-retrieval":
            _write_clip_retrieval(temporary, shards, batches)
        else:
            _write_npy(temporary, shards[0], batches)
        write_json(temporary / ENCODER_FILE, asdict(store.encoder))
        kind = write_faiss(store, snapshot, faiss, temporary, progress) if faiss is not None else None
        if store.snapshot().numbers[: len(snapshot.numbers)] != snapshot.numbers:  # its rows have other numbers now
            raise StoreError(compacted)
    return ExportReport(
        folder=str(folder.absolute()), layout=layout, count=len(snapshot.live_rows), dim=store.encoder.dim,
        files=len(shards), faiss=kind,
    )  # fmt: skip


@contextmanager
def _told_of_compaction(message: str) -> Iterator[None]:
    try:
        yield
    except CompactedError:
        raise StoreError(message) from None


def _shards(snapshot: Snapshot) -> Iterator[Int[np.ndarray, "some"]]:
    rows = snapshot.live_rows
    return (rows[start : start + SHARD_ROWS] for start in range(0, len(rows), SHARD_ROWS))


class _Batches:
    """Vectors and items of rows, a bounded number at a time; counts what it has given out."""

    def __init__(self, store: Store, snapshot: Snapshot, progress: Progress | None) -> None:
        self.dim, self.kinds = store.encoder.dim, metadata_kinds(store.live)
        self._store, self._snapshot, self._progress, self._done = store, snapshot, progress, 0

    def of(self, rows: Int[np.ndarray, "some"]) -> Batches:
        for start in range(0, len(rows), BATCH_ROWS):
            some = rows[start : start + BATCH_ROWS]
            yield self._store.embeddings(some, self._snapshot), self._store.items(some, self._snapshot)
            self._done += len(some)
            if self._progress is not None:
                self._progress("exporting embeddings", self._done, len(self._snapshot.live_rows))


def _write_clip_retrieval(folder: Path, shards: Sequence[np.ndarray], batches: _Batches) -> None:
    digits = len(str(len(shards) - 1))  # readers sort the files by name
    (folder / "img_emb").mkdir()
    (folder / "metadata").mkdir()
    urls = False
    for number, rows in enumerate(shards):
        name = str(number).zfill(digits)
        with ExitStack() as stack:
            vectors = stack.enter_context(_npy_file(folder / "img_emb" / f"img_emb_{name}.npy", len(rows), batches.dim))
            table: Any = None
            for embeddings, items in batches.of(rows):
                if table is None:
                    urls = urls or (number == 0 and any(_is_url(item.source) for item in items))
                    path = folder / "metadata" / f"metadata_{name}.parquet"
                    table = stack.enter_context(_parquet_file(path, urls, batches.kinds))
                vectors.write(np.ascontiguousarray(embeddings).data)
                table.write_batch(_record_batch(table.schema, items, batches.kinds))


def _write_npy(folder: Path, rows: Int[np.ndarray, "some"], batches: _Batches) -> None:
    with (
        _npy_file(folder / EMBEDDINGS_FILE, len(rows), batches.dim) as vectors,
        _synced(folder / IDS_FILE) as ids,
        _synced(folder / PROVENANCE_FILE) as provenance,
    ):
        for embeddings, items in batches.of(rows):
            vectors.write(np.ascontiguousarray(embeddings).data)
            ids.write("".join(_id_line(item.id) for item in items).encode())
            provenance.write("".join(json.dumps(_fields(item, batches.kinds)) + "\n" for item in items).encode())


def _fields(item: Item, kinds: Kinds) -> dict[str, Any]:
    names = column_names(tuple(kinds), OWN_COLUMNS)
    told = {names[name]: value for name, value in item.metadata.items()}
    return {"id": item.id, "source": item.source, "key": item.key, CONTENT_COLUMN: item.content, **told}


def _id_line(id_: str) -> str:
    if not id_ or "\n" in id_ or id_.strip("\r\n\ufeff") != id_:
        raise UsageError(f"expected ids of one line, got {id_!r}: export as clip-retrieval, whose tables hold any id")
    return id_ + "\n"


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


@contextmanager
def _parquet_file(path: Path, urls: bool, kinds: Kinds) -> Iterator[Any]:
    """A writer of our columns and of those of metadata. clip-retrieval shows the picture at `url`, or the one on this disk at `image_path`."""
    pyarrow = _pyarrow()
    from pyarrow import parquet

    names = ["id", "image_path", *(["url"] if urls else []), "key", CONTENT_COLUMN]
    types = {str: pyarrow.string(), bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    others = column_names(tuple(kinds), OWN_COLUMNS)
    told = [(others[name], types[kind]) for name, kind in kinds.items()]
    schema = pyarrow.schema([*((name, pyarrow.string()) for name in names), *told])
    with _synced(path) as file, parquet.ParquetWriter(file, schema) as writer:
        yield writer


def _record_batch(schema: Any, items: Sequence[Item], kinds: Kinds) -> Any:
    columns: dict[str, list[Any]] = {
        "id": [item.id for item in items],
        "image_path": [item.source for item in items],
        "url": [item.source if _is_url(item.source) else None for item in items],
        "key": [item.key for item in items],
        CONTENT_COLUMN: [item.content for item in items],
    }
    for name, column in column_names(tuple(kinds), OWN_COLUMNS).items():
        columns[column] = [_as(kinds[name], item.metadata.get(name)) for item in items]
    return _pyarrow().record_batch([columns[name] for name in schema.names], schema=schema)


def _as(kind: type[Value], value: Value | None) -> Value | None:
    """The value in a column of that type; in one of texts numbers and truth values are written as JSON writes them."""
    if value is None or isinstance(value, kind):
        return value
    return json.dumps(value) if kind is str else float(value)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError(
            "expected pyarrow to write parquet tables, it is missing: pip install knn-diffusion[parquet], or export as npy"
        ) from None
    return pyarrow


@contextmanager
def _npy_file(path: Path, num_rows: int, dim: int) -> Iterator[IO[bytes]]:
    """A .npy file of float16 rows whose header is written; the rows follow as bytes, so that no array is ever whole."""
    with _synced(path) as file:
        header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (num_rows, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


@contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is on the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
