"""Eight searchers beside one that adds, removes and compacts, half of them in cells: prints JSON.

Groups of four images come and go as a whole, each group with a direction of its own, so that the groups there are always
form a run: whoever sees half a group, or a run that never was, has seen a state that was none.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from store_world import content, id_of

from knn_diffusion.retrieval import cell_engine, compaction, segments
from knn_diffusion.retrieval.dedup import OFF
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.plan import IndexConfig, Layout, Reach
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

GROUP, WINDOW, DIM = 4, 6, 16
SEARCHERS, LAYOUTS = 8, ("exact", "sq8")
"""Half of the searchers in a process for each layout."""


def direction(group: int) -> np.ndarray:
    vector = np.random.default_rng(group).standard_normal(DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def images(group: int) -> tuple[list[Item], np.ndarray, np.ndarray]:
    numbers = [GROUP * group + place for place in range(GROUP)]
    items = [Item(source=str(group), content=content(number)) for number in numbers]
    return items, np.stack([direction(group)] * GROUP), np.full((GROUP, 192), group % 256, np.uint8)


def ids(group: int) -> list[str]:
    return [id_of(GROUP * group + place) for place in range(GROUP)]


GROUPS: dict[str, int] = {}
"""The group of every image there may have been; a search that waited long finds what there was when it began."""


def group_of(one: str, end: int) -> int:
    """The group before `end` that the image is of, -1 when it is of none."""
    for group in range(len(GROUPS) // GROUP, end):
        GROUPS.update(dict.fromkeys(ids(group), group))
    return GROUPS.get(one, -1)


def search(retriever: LocalRetriever, newest: int) -> tuple[int, str | None]:
    """The newest group seen, and what is wrong with what was seen."""
    k = GROUP * WINDOW
    found = retriever.search(direction(newest)[None], k, rule=OFF)
    sources = retriever.store.consistently(
        lambda now: [item.source for item in retriever.store.items(now.live_rows, now)]
    )
    groups = sorted({int(source) for source in sources})
    if len(sources) != GROUP * len(groups) or groups != list(range(groups[0], groups[0] + len(groups))):
        return newest, f"a state that never was: {sources}"
    if len(groups) not in (WINDOW, WINDOW + 1):
        return newest, f"{len(groups)} groups at a time"
    ours = {group_of(one, groups[-1] + 60) for one in found.ids[0]}
    runs = [first for first in range(min(ours), min(ours) + 2) if ours <= set(range(first, first + WINDOW + 1))]
    if -1 in ours or not runs or found.shortfall[0]:
        return newest, f"found images of {sorted(ours)}"
    own = direction(newest).astype(np.float16).astype(np.float64)
    for one, vector, score in zip(found.ids[0], found.embeddings[0], found.scores[0], strict=True):
        expected = direction(GROUPS[one]).astype(np.float16).astype(np.float64)
        if not np.array_equal(vector, expected.astype(np.float32)):
            return newest, f"the vector of another image for {one}"
        if abs(expected @ own / np.linalg.norm(expected) / np.linalg.norm(own) - score) > 2e-3:
            return newest, f"a wrong score for {one}"
    return groups[-1], None


def searchers(folder: str, layout: Layout, done: Event, answers: Any) -> None:
    """Some of the searchers, as threads of one process on one store."""
    wrong, counts = list[str](), [0] * (SEARCHERS // len(LAYOUTS))

    def work(number: int, retriever: LocalRetriever) -> None:
        newest = 0
        try:
            while not done.is_set() or not counts[number]:
                newest, problem = search(retriever, newest)
                counts[number] += 1
                if problem:
                    wrong.append(problem)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")

    with Store.open(Path(folder)) as store:
        retriever = LocalRetriever(store, IndexConfig(layout=layout, cells=2, image=Reach(probes=2)))
        threads = [threading.Thread(target=work, args=(number, retriever)) for number in range(len(counts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    answers.put((sum(counts), wrong))


def run(folder: Path, seconds: float) -> dict[str, Any]:
    identity = EncoderIdentity(name="toy", fingerprint="f" * 16, dim=DIM)
    store = Store.create(folder / "index", identity)
    for group in range(WINDOW):
        store.append(*images(group))
    store.close()
    begin = multiprocessing.get_context("fork")
    done, answers = begin.Event(), begin.Queue()
    place = str(folder / "index")
    others = [begin.Process(target=searchers, args=(place, layout, done, answers)) for layout in LAYOUTS]
    for process in others:
        process.start()
    group, compactions, begun = WINDOW, 0, time.monotonic()
    with Store.open(folder / "index") as store:
        while time.monotonic() - begun < seconds or group < 4 * WINDOW:
            store.append(*images(group))
            store.remove(ids(group - WINDOW))
            group += 1
            if group % 5 == 0:
                store.compact()
                compactions += 1
        done.set()
        told = [answers.get(timeout=300) for _ in others]
        for process in others:
            process.join()
        problems = store.problems()
    wrong = [one for _, some in told for one in some] + problems
    return {
        "searches": sum(count for count, _ in told),
        "added": group,
        "compactions": compactions,
        "wrong": wrong[:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    compaction.SEGMENT_ROWS = segments.SEGMENT_ROWS = cell_engine.TAIL_ROWS = 8
    json.dump(run(given.folder, given.seconds), sys.stdout)


if __name__ == "__main__":
    main()
