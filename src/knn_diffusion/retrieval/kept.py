"""Indexes over cells on the disk, beside the store they were made from: in parts, each with its digest.

    cache/search.json            layout, cells, and for each part the records it covers and the store's history then
    cache/retraining.json        the same of an index of new cells, until it is complete and takes the other's place
    cache/search-<digest>.faiss  the trained indexes without rows, and the parts
    cache/search.lock            held by the process that writes the others

A part covers the records from where the one before it ends; records stay when a compaction numbers rows anew, and so do
parts. Building goes on after an interruption with the first part that is missing, and what was added since needs only
parts of its own. Anything stale, which the store's history tells, or damaged is made again. The digests are verified
before faiss reads a file: of damaged files it loads a third and answers differently.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from knn_diffusion.checkpoint import atomic_path, file_digest, write_json
from knn_diffusion.config import parse_json
from knn_diffusion.errors import KnnDiffusionError, StoreError
from knn_diffusion.retrieval.cells import faiss_module, read_cells
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

FORMAT_VERSION = 3
FACTS, RETRAINING = "search.json", "retraining.json"
LOCK = "search.lock"
LOCK_SECONDS = 60.0
"""Who cannot write after so long keeps nothing, which costs only the time to build it again."""
LOOK_SECONDS = 1.0
"""So often a search looks whether another process has trained the cells anew."""
_OWN_FILE = re.compile(r"search-([0-9a-f]{16}|[0-9a-f]{32})\.faiss")
"""Names of the files that are written here, to be deleted when nothing names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What an index over cells is, whatever rows it holds; another shape must be trained anew."""

    layout: str
    cells: int
    dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One file of rows: its digest, where its records end, and the store's age and history when it was made."""

    sha256: str
    num_records: int
    age: int
    history: str


@dataclass(kw_only=True, slots=True)
class KeptIndex:
    """The files of one store's cache folder; a store in memory has none, and one that is read-only gets no more."""

    store: Store
    shape: Shape
    facts: str = FACTS
    trained: str | None = None
    trained_records: int = 0
    """Images of later records were not there when cells and codes were trained."""
    parts: tuple[Part, ...] = ()
    trouble: str | None = None
    """Why the last file was not kept."""
    looked_at: int = 0
    look_again_at: float = 0.0

    @classmethod
    def open(cls, store: Store, shape: Shape, facts: str = FACTS) -> KeptIndex:
        """What is kept beside the store of this shape and with its history; empty when nothing is."""
        kept = cls(store=store, shape=shape, facts=facts)
        if kept.writable and store.history(store.snapshot().age) is None:
            with suppress(StoreError):  # another process writes, and begins it
                store.begin_history()
        said = read_facts(kept.folder, facts) if kept.folder is not None else None
        if said is None or said["shape"] != asdict(shape):
            return kept
        kept.trained, kept.trained_records = said["trained"], said["trained_records"]
        known: list[Part] = []
        for values in said["parts"]:
            part = Part(**values)
            if store.history(part.age) != part.history:
                break
            known.append(part)
        kept.parts = tuple(known)
        return kept

    @property
    def folder(self) -> Path | None:
        """Where the files are, None for a store in memory."""
        return self.store.folder / "cache" if self.store.folder is not None else None

    @property
    def writable(self) -> bool:
        """Whether files can be written."""
        return self.store.folder is not None and not self.store.read_only

    def forget(self) -> None:
        """Use nothing of what is kept; it stays until something is kept in its place."""
        self.trained, self.trained_records, self.parts = None, 0, ()

    def load_trained(self) -> Any | None:
        """The trained index without rows, None when it is not there or damaged."""
        return self._load(self.trained) if self.trained is not None else None

    def load_parts(self) -> list[tuple[Any, Part]]:
        """The parts up to the first that is missing or damaged."""
        loaded: list[tuple[Any, Part]] = []
        for part in self.parts:
            if (index := self._load(part.sha256)) is None:
                break
            loaded.append((index, part))
        self.parts = tuple(part for _, part in loaded)
        return loaded

    def keep_trained(self, index: Any, snapshot: Snapshot) -> None:
        """Begin anew with this index, trained on the snapshot's images."""
        with self._alone() as folder:
            self.trained = self._save(index, folder)
            self.trained_records, self.parts = snapshot.num_records, ()
            self._write_facts(folder, begin=True)

    def keep_part(self, index: Any, snapshot: Snapshot, records: range) -> None:
        """Keep the snapshot's rows of these records, instead of parts with the same ones; none after a gap."""
        before = tuple(part for part in self.parts if part.num_records <= records.start)
        history = self.store.history(snapshot.age)
        if history is None or self.trained is None or (before[-1].num_records if before else 0) != records.start:
            return
        with self._alone() as folder:
            if (digest := self._save(index, folder)) is not None:
                part = Part(sha256=digest, num_records=records.stop, age=snapshot.age, history=history)
                self.parts = (*before, part)
                self._write_facts(folder)

    def publish(self, num_records: int) -> None:
        """Put the index of new cells, complete now, in the place of the one in use, in one step.

        Raises: KnnDiffusionError when not all records could be kept; the one in use stays.
        """
        if not self.writable:
            return
        with self._alone() as folder:
            complete = self.parts and self.parts[-1].num_records >= num_records
            try:
                if folder is not None and complete:
                    (folder / RETRAINING).replace(folder / FACTS)
            except OSError as error:
                self.trouble, complete = str(error), False
            if folder is None or not complete:
                raise KnnDiffusionError(
                    f"{self.folder}: the new cells could not be kept ({self.trouble or 'parts are missing'}): free space or "
                    "change permissions; the index is searched as before"
                )
            self.facts = FACTS
            self._write_facts(folder)

    def changed(self) -> bool:
        """Whether the facts were written since this was asked last, by whomever; looked up once in LOOK_SECONDS."""
        if time.monotonic() < self.look_again_at:
            return False
        self.look_again_at = time.monotonic() + LOOK_SECONDS
        try:
            now = os.stat(self.folder / FACTS).st_mtime_ns if self.folder is not None else 0
        except OSError:
            return False
        self.looked_at, before = now, self.looked_at
        return now != before

    def superseded(self, shape: Shape) -> bool:
        """Whether an index of this shape with other cells was put in the place of this one."""
        said = read_facts(self.folder) if self.folder is not None else None
        return said is not None and said["shape"] == asdict(shape) and said["trained"] != self.trained

    @contextmanager
    def _alone(self) -> Iterator[Path | None]:
        """The folder, in which no other process or thread writes meanwhile; None when nothing can be written."""
        if self.folder is None or not self.writable:
            yield None
            return
        lock = FileLock(self.folder / LOCK, timeout=LOCK_SECONDS)
        try:
            self.store.live.require_own()
            self.folder.mkdir(exist_ok=True)
            lock.acquire()
        except (
            StoreError,
            OSError,
            NotImplementedError,
        ) as error:  # another's folder, waited too long, or a file system that knows no locks
            self.trouble = str(error)
            yield None
            return
        try:
            yield self.folder
        finally:
            lock.release()

    def _save(self, index: Any, folder: Path | None) -> str | None:
        """Write an index under its digest. A disk that is full costs only the time to build it again."""
        if folder is None:
            return None
        written = folder / f"search-{uuid4().hex}.faiss"
        try:
            with atomic_path(written) as temporary:
                faiss_module().write_index(index, str(temporary))
            digest = file_digest(written)
            written.replace(_path(folder, digest))
        except (KnnDiffusionError, OSError, RuntimeError) as error:
            self.trouble = str(error)
            return None
        return digest

    def _load(self, digest: str) -> Any | None:
        if self.folder is None or not _whole(self.folder, digest):
            return None
        try:
            return read_cells(_path(self.folder, digest))
        except (OSError, RuntimeError):  # deleted just now by a process that keeps other cells
            return None

    def _write_facts(self, folder: Path | None, *, begin: bool = False) -> None:
        """Say what there is, unless cells that are not ours took their place; then delete what nothing names any more."""
        if folder is None:
            return
        before = read_facts(folder, self.facts)
        if begin or before is None or before["trained"] == self.trained:
            said = {"shape": asdict(self.shape), "trained": self.trained, "trained_records": self.trained_records}
            parts = [asdict(part) for part in self.parts]
            try:
                write_json(folder / self.facts, {"format": FORMAT_VERSION, **said, "parts": parts})
            except KnnDiffusionError as error:
                self.trouble = str(error)
                return
        files = [read_facts(folder, name) for name in (FACTS, RETRAINING)]
        named = {_path(folder, digest).name for said in files if said for digest in _digests(said)}
        for path in folder.glob("search*.faiss"):
            if _OWN_FILE.fullmatch(path.name) and path.name not in named:
                with suppress(OSError):
                    path.unlink()


def read_facts(folder: Path, name: str = FACTS) -> dict[str, Any] | None:
    """What the index kept in a cache folder is, None when there is none or it cannot be read."""
    try:
        facts = parse_json((folder / name).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT_VERSION:
            return None
        Shape(**facts["shape"])
        [Part(**part) for part in facts["parts"]]
        return {name: facts[name] for name in ("shape", "trained", "trained_records", "parts")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kept_cells(folder: Path, layout: str) -> int | None:
    """How many cells the index kept in a store's folder has, None when there is none of this layout."""
    facts = read_facts(folder / "cache")
    return facts["shape"]["cells"] if facts is not None and facts["shape"]["layout"] == layout else None


def cache_problem(folder: Path) -> str | None:
    """What is wrong with the index kept in a store's folder, None when it is whole, not there, or of another version."""
    cache = folder / "cache"
    with suppress(OSError, ValueError, AttributeError):
        if parse_json((cache / FACTS).read_text(encoding="utf-8")).get("format", FORMAT_VERSION) != FORMAT_VERSION:
            return None
    if not (cache / FACTS).is_file() and not list(cache.glob("search*.faiss")):
        return None
    facts = read_facts(cache)
    if facts is not None and all(_whole(cache, digest) for digest in _digests(facts)):
        return None
    return "the search index in cache/ is damaged or incomplete: delete the cache folder, it is made again"


def _digests(facts: dict[str, Any]) -> list[str]:
    trained = [facts["trained"]] if facts["trained"] is not None else []
    return trained + [part["sha256"] for part in facts["parts"]]


def _path(folder: Path, digest: str) -> Path:
    return folder / f"search-{digest[:16]}.faiss"


def _whole(folder: Path, digest: str) -> bool:
    path = _path(folder, digest)
    return path.is_file() and file_digest(path) == digest
