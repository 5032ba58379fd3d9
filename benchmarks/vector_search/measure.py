"""Recall, time and memory of one search function, in a process of its own."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from vector_search.data import Data, K

Search = Callable[[Float32[np.ndarray, "queries dim"], int], Int[np.ndarray, "queries k"]]
"""Rows of the k nearest of each query, -1 where fewer were found."""

NUM_SINGLES = 200
"""Queries asked one at a time for the latency."""
MIN_SECONDS = 1.0
"""A batch is repeated until so much time has passed."""


def recall(found: Int[np.ndarray, "queries found"], truth: Int[np.ndarray, "queries k"]) -> float:
    """Share of the true neighbors that were found, averaged over the queries."""
    return float((found[:, :, None] == truth[:, None, :]).any(1).mean())


def recalls(search: Search, data: Data) -> dict[str, float]:
    """Recall@10 for each kind of query."""
    return {f"{kind}_recall": recall(search(data.queries[kind], K), data.truth[kind]) for kind in data.queries}


def singles(
    search: Search, queries: Float32[np.ndarray, "queries dim"], count: int = NUM_SINGLES, *, warm: bool = True
) -> dict[str, float]:
    """Wall and CPU time of queries asked one at a time, in milliseconds, and KiB read from the disk for each."""
    chosen = [queries[place % len(queries)][None] for place in range(count)]
    for query in chosen[:10] if warm else []:
        search(query, K)
    seconds, used, read = [], time.process_time(), blocks_read()
    for query in chosen:
        start = time.perf_counter()
        search(query, K)
        seconds.append(time.perf_counter() - start)
    used = time.process_time() - used
    return {
        "cpu_ms_single": 1e3 * used / count,
        "p50_ms": 1e3 * float(np.percentile(seconds, 50)),
        "p99_ms": 1e3 * float(np.percentile(seconds, 99)),
        "disk_kib": (blocks_read() - read) / 2 / count,
    }


def batch(search: Search, queries: Float32[np.ndarray, "queries dim"]) -> dict[str, float]:
    """Throughput and CPU time of queries asked together."""
    search(queries[:100], K)
    done, start, used = 0, time.perf_counter(), time.process_time()
    while done == 0 or time.perf_counter() - start < MIN_SECONDS:
        search(queries, K)
        done += len(queries)
    seconds = time.perf_counter() - start
    return {"cpu_ms_batch": 1e3 * (time.process_time() - used) / done, "queries_per_second": done / seconds}


def memory() -> dict[str, int]:
    """Bytes this process holds: its own, and pages of files that the system may take back.

    Own memory is what a server must have; mapped pages fill up with use and cost nothing but speed when they are dropped.
    """
    found = {"own_bytes": 0, "mapped_bytes": 0}
    status = Path("/proc/self/status")
    if not status.exists():  # no such file beside Linux: then memory is not reported
        return found
    for line in status.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found["own_bytes" if name == "RssAnon" else "mapped_bytes"] = 1024 * int(value.split()[0])
    return found


def blocks_read() -> int:
    """Blocks of 512 bytes that this process has made the system read from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def drop_from_page_cache(folder: Path) -> None:
    """Make the system forget the files' pages, so that the next read goes to the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
