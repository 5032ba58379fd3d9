"""Folders that many processes fill: claimed first, whole files only, finished last."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from knn_diffusion.errors import UsageError

CHUNK = 250
T = TypeVar("T")
R = TypeVar("R")


def chunks(items: Sequence[T]) -> list[Sequence[T]]:
    """The items in pieces of work for one process."""
    return [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]


def spread(work: Callable[[T], R], jobs: Sequence[T], processes: int) -> Iterator[R]:
    """Results of the jobs in their order, worked on by as many processes."""
    if processes <= 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, jobs)


def write_text(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    from knn_diffusion.checkpoint import atomic_write_bytes  # here, so that drawing processes load no torch

    atomic_write_bytes(path, text.encode("utf-8"))


def open_folder(place: Path, facts: dict[str, Any]) -> bool:
    """Whether the data set is there and finished; claims an empty folder by the file `unfinished.json`.

    Raises: UsageError when the folder holds anything else.
    """
    place.mkdir(parents=True, exist_ok=True)
    for name, finished in (("dataset.json", True), ("unfinished.json", False)):
        if (place / name).exists():
            try:
                found = json.loads((place / name).read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if found != facts:
                raise UsageError(
                    f"expected an empty folder or the same data set, {place} holds another: choose another folder"
                )
            return finished
    if any(place.iterdir()):
        raise UsageError(f"expected an empty folder, {place} holds other files: choose another folder")
    write_text(place / "unfinished.json", json.dumps(facts, indent=2) + "\n")
    return False


def finish_folder(place: Path, facts: dict[str, Any]) -> None:
    """Say that the data set is complete."""
    write_text(place / "dataset.json", json.dumps(facts, indent=2) + "\n")
    (place / "unfinished.json").unlink()
