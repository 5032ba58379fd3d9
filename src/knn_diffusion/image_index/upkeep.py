"""Compaction without being asked: in a thread, whenever enough images were removed or enough small files have come."""

from __future__ import annotations

import threading

from knn_diffusion.errors import KnnDiffusionError, StoreError
from knn_diffusion.retrieval.identity import refuse_links
from knn_diffusion.retrieval.store import Store


class Upkeep:
    """Compacts one store in the background, once at a time; searches, additions and removals go on meanwhile."""

    def __init__(self, store: Store) -> None:
        self.problem: KnnDiffusionError | None = None
        """What stopped the last compaction, such as a full disk; the store is as it was then."""
        self._store, self._lock = store, threading.Lock()
        self._worker: threading.Thread | None = None

    def look(self) -> None:
        """Begin a compaction if it is worth it; one under way looks again when it is done."""
        with self._lock:
            if (self._worker is None or not self._worker.is_alive()) and self._store.waste().worthwhile:
                self._worker = threading.Thread(target=self._compact, daemon=True)
                self._worker.start()

    def wait(self) -> None:
        """Until no compaction is under way."""
        while (worker := self._worker) is not None and worker.is_alive():
            worker.join()

    def _compact(self) -> None:
        compacted = -1
        try:
            while (generation := self._store.snapshot().generation) != compacted and not self._is_done():
                self._store.compact()
                self.problem, compacted = None, generation
        except KnnDiffusionError as error:
            self.problem = error

    def _is_done(self) -> bool:
        """Whether there is nothing left that is worth it; then the next `look` begins another thread."""
        with self._lock:
            if self._store.waste().worthwhile:
                return False
            self._worker = None
            return True


def require_writable(store: Store) -> None:
    """Raise StoreError when changes of the store would stay in memory, saying why."""
    refuse_links(store.folder)
    if store.read_only:
        raise StoreError(f"expected an index that can be changed, {store.name} is read-only: save a copy of it")
