"""Kills writers and fails their calls, and looks at what is left: `python torture_kills.py sweep|random …` prints JSON.

`sweep` needs the library of torture_faults.c loaded (LD_PRELOAD). It stops a writer at each of its calls that change a
file, SQLite's included: killed before the call or with half of it written, or the call fails with ENOSPC or EIO. Another
process then looks whether every acknowledged change is there, and the unacknowledged one as a whole or not at all.
`random` kills a writer at any moment, again and again, on a store that grows old. A writer as people write them (np.save
and a list of what was saved) goes through the same, and must fail.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from store_world import batch, everything, filled, id_of

from knn_diffusion.errors import KnnDiffusionError
from knn_diffusion.retrieval import compaction, segments
from knn_diffusion.retrieval.store import Store

KILL, TEAR = 0, -1
ACTIONS = {"kill": KILL, "tear": TEAR, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO}

State = frozenset[int]
Step = tuple[Callable[[Store], object], State]
"""What is done, and the images there are afterwards."""


def small_segments() -> None:
    compaction.SEGMENT_ROWS = segments.SEGMENT_ROWS = 8


def adding(numbers: range, before: State) -> Step:
    return (lambda store: store.append(*batch(numbers))), before | set(numbers)


def removing(numbers: list[int], before: State) -> Step:
    return (lambda store: store.remove([id_of(n) for n in numbers])), before - set(numbers)


def compacting(before: State) -> Step:
    return (lambda store: store.compact()), before


def held(store: Store) -> State:
    """The images a store holds, each verified to be what it must be."""
    found = everything(store)
    numbers = {int(told[0].split("/")[1][:-4]) for told in found.values()}
    assert {id_of(n) for n in numbers} == set(found), "ids are not those of the images"
    vectors = np.stack([np.frombuffer(told[1], np.float16) for told in found.values()]).astype(float)
    given = batch([int(told[0].split("/")[1][:-4]) for told in found.values()])[1].astype(float)
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    assert np.abs(vectors - given).max() < 2e-3, "vectors are not those of the images"
    assert all(told[3] == f"picture {told[0].split('/')[1][:-4]}".encode() for told in found.values()), "previews"
    return frozenset(numbers)


def found_wrong(folder: Path, allowed: list[State]) -> str | None:
    """What is wrong with a store after its writer has ended, None for one of the allowed states and a sound store."""
    try:
        with Store.open(folder) as store:
            if held(store) not in allowed:
                return f"holds {sorted(held(store))}, expected one of {[sorted(one) for one in allowed]}"
            if problems := store.problems():
                return "; ".join(problems)
            store.append(*batch(range(900, 902)))
            store.compact()
            after = held(store) - {900, 901}
            left = [path.name for path in folder.iterdir() if path.name not in ("segments", "store.sqlite")]
        if after not in allowed:
            return f"holds {sorted(after)} after another addition and a compaction"
        left = [path.name for path in folder.iterdir() if path.name not in ("segments", "store.sqlite")]
        return f"left {left}" if left else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# Every call of a writer


def steps() -> list[Step]:
    """What the writer does, from the store of `template` on."""
    start = frozenset({0, 2, 3, 4, 5, 6, 7})
    done = [adding(range(10, 14), start)]
    done.append(removing([4, 11], done[-1][1]))
    done.append(compacting(done[-1][1]))
    done.append(adding(range(20, 23), done[-1][1]))
    return [(lambda store: None, start), *done]


def template(folder: Path) -> None:
    with filled(folder, range(4), range(4, 8)) as store:
        store.remove([id_of(1)])


class Trials:
    """Runs of one writer in processes of their own, each struck at another call."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.library = folder, ctypes.CDLL(None)
        if not hasattr(self.library, "faults_arm"):
            raise SystemExit("the library of torture_faults.c is not loaded (LD_PRELOAD)")
        self.library.faults_seen.restype = ctypes.c_long
        template(folder / "template")

    def run(self, work: Callable[[Path, Callable[[str], None]], None], call: int, action: int) -> tuple[list[str], int]:
        """What the writer said until it ended, and the signal that ended it."""
        place = self.folder / "trial"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.folder / "template", place)
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                self.library.faults_arm(os.fsencode(str(place)), ctypes.c_long(call), action)
                work(place, lambda word: os.write(writing, f"{word}\n".encode()) and None)
                os.write(writing, f"calls {self.library.faults_seen()}\n".encode())
            except BaseException as error:
                os.write(writing, f"wrong {type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read().splitlines()
        return said, os.WTERMSIG(os.waitpid(child, 0)[1])


def work(place: Path, say: Callable[[str], None]) -> None:
    """The writer: each change once, and once more after an error that left the store as it was."""
    done = steps()
    with Store.open(place) as store:
        for number, (change, after) in enumerate(done):
            try:
                change(store)
            except KnnDiffusionError:
                say("failed")
                if held(store) not in (done[number - 1][1], after):
                    say(f"wrong state {sorted(held(store))} after an error")
                if held(store) != after or number == 3:
                    change(store)
            say("done")


def careless(place: Path, say: Callable[[str], None]) -> None:
    """The control: vectors by np.save, then a list of what was saved."""
    for number in (1, 2):
        np.save(place / "vectors.npy", np.full((100 * number, 8), number, np.float32))
        (place / "list.json").write_text(json.dumps({"rows": 100 * number}))
        say("done")


def careless_is_sound(place: Path, acknowledged: int) -> bool:
    if not acknowledged and not (place / "list.json").exists():
        return True
    try:
        vectors, rows = np.load(place / "vectors.npy"), json.loads((place / "list.json").read_text())["rows"]
        return len(vectors) == rows >= 100 * acknowledged and bool((vectors == vectors[0, 0]).all())
    except (OSError, ValueError, EOFError):
        return False


def sweep(folder: Path, actions: list[str], first: int, stride: int) -> dict[str, Any]:
    """Strike each call (or every stride-th), in each way in turn."""
    trials, wrong, counts = Trials(folder), list[str](), dict.fromkeys((*ACTIONS, "refused", "passed over"), 0)
    calls = int(trials.run(work, 0, KILL)[0][-1].split()[1])
    for turn, call in enumerate(range(1 + first, calls + 1, stride)):
        action = actions[turn % len(actions)]
        said, ended = trials.run(work, call, ACTIONS[action])
        counts[action] += 1
        wrong += [f"{action} at call {call}: {word}" for word in said if word.startswith("wrong")]
        acknowledged = said.count("done") - 1
        if ACTIONS[action] in (KILL, TEAR):
            if ended != signal.SIGKILL:
                wrong.append(f"{action} at call {call}: the writer was not killed")
            allowed = [steps()[n][1] for n in {acknowledged, min(acknowledged + 1, len(steps()) - 1)}]
        else:
            counts["refused" if "failed" in said else "passed over"] += 1
            allowed = [steps()[-1][1]]
        if problem := found_wrong(folder / "trial", allowed):
            wrong.append(f"{action} at call {call}, {acknowledged} acknowledged: {problem}")
    return {"calls": calls, **counts, "wrong": wrong, "control_failed": control(trials)}


def control(trials: Trials) -> int:
    """How often the careless writer loses what it acknowledged."""
    calls, failed = int(trials.run(careless, 0, KILL)[0][-1].split()[1]), 0
    for call in range(1, calls + 1):
        for action in (KILL, TEAR):
            said, _ = trials.run(careless, call, action)
            failed += not careless_is_sound(trials.folder / "trial", said.count("done"))
    return failed


# Any moment


def changes(state: State, seed: int) -> Iterator[Step]:
    """Endless changes that follow from the seed."""
    draw, new = random.Random(seed), 1 + max(state, default=0)
    while True:
        kind = draw.random()
        if kind < 0.15 and len(state) > 40:
            step = compacting(state)
        elif (kind < 0.3 and len(state) > 20) or len(state) > 120:
            step = removing(draw.sample(sorted(state), 10), state)
        else:
            step = adding(range(new, new + draw.randint(1, 12)), state)
            new = 1 + max(step[1])
        state = step[1]
        yield step


def at_random(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill a writer at any moment, look, and let the next one go on."""
    folder.mkdir(parents=True, exist_ok=True)
    place, state, acknowledged, wrong, draw = folder / "old", frozenset[int](), 0, list[str](), random.Random(seed)
    filled(place).close()
    for kill in range(kills):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            with Store.open(place) as store:
                os.write(writing, b"begun\n")
                for change, _ in changes(state, seed + kill):
                    change(store)
                    os.write(writing, b"done\n")
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            said, begun, wanted = b"", time.monotonic(), draw.randrange(5)
            while said.count(b"\n") <= wanted:
                said += pipe.read(4096)
            time.sleep(draw.uniform(0, (time.monotonic() - begun) / (wanted + 1)))  # as slow as the machine is now
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            while more := pipe.read(4096):
                said += more
        done = said.count(b"done")
        acknowledged += done
        states = [state, *(after for _, (_, after) in zip(range(done + 1), changes(state, seed + kill), strict=False))]
        try:
            with Store.open(place) as store:
                found, problems = held(store) if len(store) else frozenset[int](), store.problems()
                newest = max(found | {0})
        except Exception as error:
            return {"kills": kill + 1, "acknowledged": acknowledged, "wrong": [*wrong, f"kill {kill}: {error}"]}
        if found not in states[done:] or problems:
            wrong.append(f"kill {kill}: {done} acknowledged, holds {len(found)} up to {newest}; {problems}")
        state = found
    return {"kills": kills, "acknowledged": acknowledged, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("sweep", "random"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--actions", default=",".join(ACTIONS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    small_segments()
    if given.what == "sweep":
        report = sweep(given.folder, given.actions.split(","), given.first, given.stride)
    else:
        report = at_random(given.folder, given.kills, given.seed)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
