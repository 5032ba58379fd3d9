"""One build, measurement or scenario in a fresh process, so that memory and caches are its own; JSON on standard output.

    python -m vector_search.worker build|measure|scenario|write NAME DATA [--built FOLDER]

Threads are set by the caller, by OMP_NUM_THREADS and its like, before anything is imported.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from vector_search.adding import write_batches
from vector_search.data import Data
from vector_search.measure import batch, memory, recalls, singles
from vector_search.registry import SYSTEMS
from vector_search.scenarios import SCENARIOS

NUM_COLD = 100
NUM_FIRST = 20
"""Queries of each setting before memory is taken: it has then loaded what it needs, but no large batch yet."""


def build(name: str, data: Data, folder: Path) -> dict[str, Any]:
    """Build a system, and say what that took."""
    system, start = SYSTEMS[name], time.perf_counter()
    system.build(data, folder)
    seconds = time.perf_counter() - start
    sizes = system.sizes(data, folder)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "build_seconds": seconds,
        "build_peak_bytes": peak,
        "index_bytes": sizes.index / data.size,
        "index_bytes_without_fixed": (sizes.index - sizes.fixed) / data.size,
        "disk_bytes": sizes.disk / data.size,
    }


def measure(name: str, data: Data, folder: Path) -> dict[str, Any]:
    """Every setting of one system: recall, time of single queries and of batches, memory."""
    system = SYSTEMS[name]
    system.missing()
    queries, before = data.timed, memory()
    opened = system.open(data, folder)
    for setting in system.settings:
        singles(opened.search(setting), queries, NUM_FIRST)
    after = memory()
    grown = {key: (after[key] - before[key]) / data.size for key in after}
    found: dict[str, dict[str, float]] = {}
    for setting in system.settings:
        search = opened.search(setting)
        row = grown | recalls(search, data)
        if opened.make_cold is None:
            row |= singles(search, queries) | batch(search, queries)
        else:
            opened.make_cold()
            row |= singles(search, queries, NUM_COLD, warm=False)
        found[setting.label] = row
    return found


def throughput(name: str, data: Data, folder: Path) -> dict[str, Any]:
    """Queries a second of every setting, with as many threads as this process was given."""
    system = SYSTEMS[name]
    system.missing()
    opened = system.open(data, folder)
    return {
        setting.label: {"queries_per_second": batch(opened.search(setting), data.timed)["queries_per_second"]}
        for setting in system.settings
    }


def write(name: str, data: Data, folder: Path) -> None:
    """Add to a store; a line for the start and one for each batch, as soon as it is acknowledged."""
    from vector_search.ours import Ours

    system = SYSTEMS[name]
    assert isinstance(system, Ours)
    with system.retriever(data, folder) as (_, store):
        for report in write_batches(data, store):
            print(json.dumps([report.row, report.at]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["build", "measure", "throughput", "scenario", "write"])
    parser.add_argument("name")
    parser.add_argument("data", type=Path, help="folder of the data set")
    parser.add_argument("--built", type=Path, required=True, help="folder that the system is built in")
    asked = parser.parse_args()
    data = Data(asked.data)
    if asked.task == "write":
        write(asked.name, data, asked.built)
        return
    tasks = {"build": build, "measure": measure, "throughput": throughput}
    task = SCENARIOS[asked.name] if asked.task == "scenario" else None
    found = task(data, asked.built) if task else tasks[asked.task](asked.name, data, asked.built)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
