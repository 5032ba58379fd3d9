"""Adding while serving: vectors a second, seconds until one is found, and the search's p99 beside a writer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from vector_search import ours
from vector_search.data import Data, K
from vector_search.registry import SAME_PROBES, SERVED, served

MAX_ADDED, BATCH_ROWS = 200_000, 8_192
ALONE_SECONDS = 5.0
PATIENCE_SECONDS = 60.0
"""After the last batch was acknowledged, a row that is still not found is reported as never found."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Acknowledged by the store at a time (seconds since 1970), with its last row."""

    row: int
    at: float


@dataclass
class Writing:
    """What a writer has done so far; filled by a thread that follows it."""

    batches: list[Batch] = field(default_factory=list)
    started: float = 0.0
    ended: float | None = None
    error: str | None = None

    def follow(self, reports: Iterable[Batch]) -> None:
        """Until the writer ends; its first report is its start."""
        try:
            for report in reports:
                if not self.started:
                    self.started = report.at
                else:
                    self.batches.append(report)
        except Exception as error:
            self.error = repr(error)
        self.ended = time.time()


def adding(data: Data, folder: Path, *, same_process: bool) -> dict[str, Any]:
    """Search alone for a while, then beside a writer to the same store: another process, or a thread of this one."""
    work = data.folder / "adding"
    ours.link_store(folder / ours.STORE, work / ours.STORE)
    with served().retriever(data, work) as (retriever, store):
        retriever.prepare()
        ours.read_all(store, data.size)
        vectors, end = new_vectors(data), time.perf_counter() + ALONE_SECONDS
        alone, _ = _serve(retriever, data, vectors, Writing(), lambda: time.perf_counter() < end)
        writing = Writing()
        reports = write_batches(data, store) if same_process else _write_elsewhere(data, work)
        follower = threading.Thread(target=writing.follow, args=(reports,))
        follower.start()
        beside, waits = _serve(retriever, data, vectors, writing, lambda: _unfinished(writing))
        follower.join()
        retriever.prepare()  # waits for what is written in the background
    shutil.rmtree(work)
    if writing.error is not None:
        raise RuntimeError(writing.error)
    return {
        "vectors": len(vectors),
        "vectors_per_second": len(vectors) / (writing.batches[-1].at - writing.started),
        "seconds_until_found": max(waits) if len(waits) == len(writing.batches) else PATIENCE_SECONDS,
        "batches_never_found": len(writing.batches) - len(waits),
        "p50_ms_alone": 1e3 * float(np.percentile(alone, 50)),
        "p99_ms_alone": 1e3 * float(np.percentile(alone, 99)),
        "p50_ms_beside": 1e3 * float(np.percentile(beside, 50)),
        "p99_ms_beside": 1e3 * float(np.percentile(beside, 99)),
        "searches_beside": len(beside),
    }


def new_vectors(data: Data) -> Float32[np.ndarray, "rows dim"]:
    """Vectors like those there are, none of them there: rows drawn at random and moved to cosine .9."""
    draw = np.random.default_rng(7)
    count = min(MAX_ADDED, max(data.size // 5, 1))
    old = np.array(data.vectors[np.sort(draw.integers(0, data.size, count))])
    away = draw.standard_normal(old.shape, np.float32)
    away -= (away * old).sum(1, keepdims=True) * old
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    return (0.9 * old + np.sqrt(1 - 0.9**2) * away).astype(np.float32)


def write_batches(data: Data, store: Any) -> Iterator[Batch]:
    """Append the new vectors; the start, then each batch when it is acknowledged."""
    vectors = new_vectors(data)
    yield Batch(-1, time.time())
    for row in ours.append_batches(store, vectors, data.size, BATCH_ROWS):
        yield Batch(row, time.time())


def _write_elsewhere(data: Data, folder: Path) -> Iterator[Batch]:
    """The same by another process, as `index add` beside a server."""
    command = [sys.executable, "-m", "vector_search.worker", "write", SERVED, str(data.folder), "--built", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from (Batch(*json.loads(line)) for line in process.stdout)
    if process.returncode:
        raise RuntimeError(f"the writing process ended with {process.returncode}")


def _unfinished(writing: Writing) -> bool:
    """Whether the writer still writes, or rows it has written may still be found."""
    return writing.ended is None or time.time() < writing.ended + PATIENCE_SECONDS


def _serve(
    retriever: Any,
    data: Data,
    vectors: Float32[np.ndarray, "rows dim"],
    writing: Writing,
    goes_on: Callable[[], bool],
) -> tuple[list[float], list[float]]:
    """Search until told to stop: seconds of each query, and seconds from each acknowledgment until the row was found."""
    seconds: list[float] = []
    waits: list[float] = []
    search = ours.nearest(retriever, SAME_PROBES)
    while goes_on():
        if writing.ended is not None and len(waits) == len(writing.batches):
            break
        sought = writing.batches[len(waits)] if len(waits) < len(writing.batches) else None
        query = data.timed[len(seconds) % len(data.timed)] if sought is None else vectors[sought.row - data.size]
        start = time.perf_counter()
        rows = search(query[None], K)
        seconds.append(time.perf_counter() - start)
        if sought is not None and sought.row in rows[0]:
            waits.append(time.time() - sought.at)
    return seconds, waits
