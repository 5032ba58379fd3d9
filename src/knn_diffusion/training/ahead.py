"""The batch of the next step is gathered by a thread while the one before is learned from."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from knn_diffusion.training.data import Batch


class Ahead:
    """Batches of consecutive steps; what a batch holds depends on its step alone, so that nothing else changes."""

    def __init__(self, gather: Callable[[int], Batch], last: int) -> None:
        """Args: gather: the batch of a step; last: the step after which there is none."""
        self._gather, self._last = gather, last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._next: tuple[int, Future[Batch]] | None = None
        self.waited = 0.0
        """Seconds in which somebody has waited for a batch."""

    def take(self, step: int) -> Batch:
        """The batch of a step; that of the next one is begun. Raises: what gathering it raised."""
        begun, self._next = self._next, None
        future = begun[1] if begun is not None and begun[0] == step else self._thread.submit(self._gather, step)
        if step < self._last:
            self._next = step + 1, self._thread.submit(self._gather, step + 1)
        started = time.perf_counter()
        batch = future.result()
        self.waited += time.perf_counter() - started
        return batch

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
