"""Indexes over cells on the disk, beside the store they were made from: in parts, each with its digest.

    cache/search.json            layout, cells, and for each part the records it covers and the store's history then
    cache/search-<digest>.faiss  the trained index without rows, and the parts

A part covers the records from where the one before it ends; records stay when a compaction numbers rows anew, and so do
parts. Building goes on after an interruption with the first part that is missing, and what was added since needs only
parts of its own. Anything stale, which the store's history tells, or damaged is made again. The digests are verified
before faiss reads a file: of damaged files it loads a third and answers differently.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knn_diffusion.checkpoint import atomic_path, file_digest, write_json
from knn_diffusion.errors import KnnDiffusionError, StoreError
from knn_diffusion.retrieval.cells import faiss_module
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

FORMAT_VERSION = 3
FACTS = "search.json"


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
    trained: str | None = None
    parts: tuple[Part, ...] = ()

    @classmethod
    def open(cls, store: Store, shape: Shape) -> KeptIndex:
        """What is kept beside the store of this shape and with its history; empty when nothing is."""
        kept = cls(store=store, shape=shape)
        if kept.writable and store.history(store.snapshot().age) is None:
            with suppress(StoreError):  # another process writes, and begins it
                store.begin_history()
        facts = read_facts(kept.folder) if kept.folder is not None else None
        if facts is None or facts["shape"] != asdict(shape):
            return kept
        kept.trained = facts["trained"]
        known: list[Part] = []
        for values in facts["parts"]:
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

    def keep_trained(self, index: Any) -> None:
        """Begin anew with this trained index."""
        self.trained, self.parts = self._save(index), ()
        self._write_facts()

    def keep_part(self, index: Any, snapshot: Snapshot, num_records: int, *, instead_of: int = 0) -> None:
        """Keep the snapshot's rows up to a record, `instead_of` so many of the last parts."""
        history = self.store.history(snapshot.age)
        digest = self._save(index) if history is not None else None
        if history is None or digest is None or self.trained is None:
            return
        part = Part(sha256=digest, num_records=num_records, age=snapshot.age, history=history)
        self.parts = (*self.parts[: len(self.parts) - instead_of], part)
        self._write_facts()

    def _save(self, index: Any) -> str | None:
        """Write an index under its digest. A disk that is full costs only the time to build it again."""
        if self.folder is None or not self.writable:
            return None
        written = self.folder / f"search-new-{os.getpid()}.faiss"
        try:
            with atomic_path(written) as temporary:
                faiss_module().write_index(index, str(temporary))
            digest = file_digest(written)
            written.replace(_path(self.folder, digest))
        except (KnnDiffusionError, OSError, RuntimeError):
            return None
        return digest

    def _load(self, digest: str) -> Any | None:
        if self.folder is None or not _whole(self.folder, digest):
            return None
        return faiss_module().read_index(str(_path(self.folder, digest)))

    def _write_facts(self) -> None:
        """Say what there is, then delete what nothing names any more."""
        if self.folder is None or not self.writable:
            return
        parts = [asdict(part) for part in self.parts]
        facts = {"format": FORMAT_VERSION, "shape": asdict(self.shape), "trained": self.trained, "parts": parts}
        try:
            write_json(self.folder / FACTS, facts)
        except KnnDiffusionError:
            return
        named = {_path(self.folder, digest).name for digest in _digests(facts)}
        for path in self.folder.glob("search*.faiss"):
            if path.name not in named:
                with suppress(OSError):
                    path.unlink()


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What the index kept in a cache folder is, None when there is none or it cannot be read."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT_VERSION:
            return None
        [Part(**part) for part in facts["parts"]]
        return {name: facts[name] for name in ("shape", "trained", "parts")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cache_problem(folder: Path) -> str | None:
    """What is wrong with the index kept in a store's folder, None when it is whole or not there."""
    cache = folder / "cache"
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
