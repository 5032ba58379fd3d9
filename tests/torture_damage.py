"""Damages files of a store, and looks whether anybody is told something else than the truth: prints JSON.

Five kinds of damage: cut off, one bit flipped anywhere, one in the first 200 bytes, eight bytes of ones in the head, a page
of zeros. A damaged store may refuse, or answer as before. Answers come from all that a search reads. Looking up images by
their id or content goes through SQLite's indexes, where a lost entry can only be found by the check, as a lost preview.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from store_world import batch, content, everything, filled, id_of

from knn_diffusion.errors import KnnDiffusionError
from knn_diffusion.retrieval import store as store_module
from knn_diffusion.retrieval.store import Store

PAGE, SLOW_SECONDS = 4096, 2.0
IMAGES = 150


def cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def flip(data: bytearray, draw: random.Random) -> bytearray:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def flip_head(data: bytearray, draw: random.Random) -> bytearray:
    data[draw.randrange(min(200, len(data)))] ^= 1 << draw.randrange(8)
    return data


def huge(data: bytearray, draw: random.Random) -> bytearray:
    place = draw.randrange(min(400, len(data)))
    data[place : place + 8] = b"\xff" * len(data[place : place + 8])
    return data


def zeros(data: bytearray, draw: random.Random) -> bytearray:
    place = PAGE * draw.randrange(1 + (len(data) - 1) // PAGE)
    data[place : place + PAGE] = bytes(len(data[place : place + PAGE]))
    return data


KINDS: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "cut": cut, "flip": flip, "flip head": flip_head, "huge": huge, "zeros": zeros
}  # fmt: skip


def template(folder: Path) -> None:
    """A store that is the same, byte for byte, whenever it is made."""
    store_module.time = SimpleNamespace(time=lambda: 1.7e9)  # type: ignore[attr-defined]
    with filled(folder, range(IMAGES), range(IMAGES, IMAGES + 40)) as store:
        store.set_setting("dedup", "{}")
        store.remove([id_of(number) for number in range(3, IMAGES, 9)])
        store.compact()
        store.append(*batch(range(500, 520)))
        store.remove([id_of(number) for number in range(501, 510)])


def read(store: Store) -> list[object]:
    """Everything that a search reads."""
    snapshot = store.snapshot()
    seen = {id_: told[:3] for id_, told in everything(store).items()}
    said: list[object] = [store.encoder, snapshot.generation, store.setting("dedup"), seen]
    return [*said, store.thumbnails(snapshot.live_rows)[1].tolist(), store.embeddings(snapshot.live_rows).tobytes()]


def look_up(store: Store) -> list[object]:
    """What goes through the database's indexes, or compares its texts, or may not be there."""
    numbers = [*range(0, IMAGES, 7), 505, 515]
    rows = store.rows_of([id_of(number) for number in numbers]).tolist()
    previews = [told[3] for told in everything(store).values()]
    return [
        previews,
        rows,
        [store.id_of_content(content(n)) for n in numbers],
        store.matching("source LIKE '%7%'").tolist(),
    ]


def trial(folder: Path, truth: list[object], looked_up: list[object]) -> str:
    """What became of a damaged store: refused, as before, or the lie that it told."""
    try:
        with Store.open(folder) as store:
            if read(store) != truth:
                return "LIED"
            if look_up(store) == looked_up:
                return "as before"
            return "found by the check" if store.problems() else "LIED in looking up"
    except KnnDiffusionError as error:
        return "refused" if "\n" not in str(error) else f"refused in many lines: {error!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def damaged(source: Path, place: Path, name: str, kind: str, draw: random.Random) -> bool:
    """Make a damaged copy; whether it differs from the whole one."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    whole = (place / name).read_bytes()
    (place / name).write_bytes(KINDS[kind](bytearray(whole), draw))
    return (place / name).read_bytes() != whole


def store_trials(folder: Path, trials: int, seed: int) -> dict[str, Any]:
    """Damage a file of the store, a hundred times in each process, so that a crash is seen."""
    template(folder / "whole")
    with Store.open(folder / "whole") as store:
        truth, looked_up = read(store), look_up(store)
    files = sorted(str(path.relative_to(folder / "whole")) for path in (folder / "whole").rglob("*") if path.is_file())
    counts, wrong, slowest = Counter[str](), list[str](), 0.0
    for start in range(0, trials, 100):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            with os.fdopen(writing, "w") as pipe:
                for number in range(start, min(start + 100, trials)):
                    draw = random.Random(seed + number)
                    # The database is what is most delicate: half of the trials are its.
                    name, kind = draw.choice([draw.choice(files), "store.sqlite"]), draw.choice(sorted(KINDS))
                    if damaged(folder / "whole", folder / "trial", name, kind, draw):
                        begun = time.process_time()
                        result = trial(folder / "trial", truth, looked_up)
                        seconds = time.process_time() - begun
                        print(json.dumps([f"{kind} of {name}, trial {number}", result, seconds]), file=pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            told = [json.loads(line) for line in pipe]
        if ended := os.WTERMSIG(os.waitpid(child, 0)[1]):
            wrong.append(f"killed by {signal.Signals(ended).name} after {len(told)} trials from {start} on")
        for what, result, seconds in told:
            counts[result if result in ("refused", "as before", "found by the check") else "wrong"] += 1
            slowest = max(slowest, seconds)
            if result not in ("refused", "as before", "found by the check") or seconds > SLOW_SECONDS:
                wrong.append(f"{what}: {result} in {seconds:.1f} s")
    return {**counts, "slowest_seconds": round(slowest, 2), "wrong": wrong}


def cache_trials(folder: Path, trials: int, seed: int) -> dict[str, Any]:
    """Damage the search index made from a store, or take a file of it away: it is made again, with the same answers."""
    from knn_diffusion.retrieval.index import LocalRetriever
    from knn_diffusion.retrieval.plan import IndexConfig

    config = IndexConfig(layout="sq8", cells=4)
    template(folder / "whole")
    queries = batch(range(10))[1]

    def search(place: Path) -> tuple[list[list[str]], bytes]:
        with Store.open(place) as store:
            retriever = LocalRetriever(store, config)
            retriever.prepare()
            found = retriever.search(queries, 5)
            return found.ids, found.scores.tobytes()

    truth = search(folder / "whole")
    files = sorted(
        path for path in (folder / "whole" / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"
    )
    counts, wrong = Counter[str](), list[str]()
    for number in range(trials):
        draw = random.Random(seed + number)
        name = str(draw.choice(files).relative_to(folder / "whole"))
        kind = draw.choice([*sorted(KINDS), "missing"])
        damaged(folder / "whole", folder / "trial", name, "flip" if kind == "missing" else kind, draw)
        if kind == "missing":
            (folder / "trial" / name).unlink()
        try:
            counts["as before"] += 1
            if search(folder / "trial") != truth:
                wrong.append(f"{kind} of {name}, trial {number}: another answer")
        except Exception as error:
            wrong.append(f"{kind} of {name}, trial {number}: {type(error).__name__}: {error}")
    return {"files": len(files), **counts, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("store", "cache"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    run = store_trials if given.what == "store" else cache_trials
    json.dump(run(given.folder, given.trials, given.seed), sys.stdout)


if __name__ == "__main__":
    main()
