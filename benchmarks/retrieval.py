"""Claim: the image index takes about half the memory of the paper's and answers several times faster, right for texts too.

    python benchmarks/retrieval.py [--size 1000000] [--only ROW...] [--rounds 3] [--cache DIR] [--json]
    python benchmarks/retrieval.py --embeddings images.npy [--text-embeddings texts.npy]

Measured side by side, on the same vectors, queries and machine: exact search, the paper's configuration (A.3: OPQ, inverted
file, one byte for two dimensions, 20 cells) by plain faiss, this package's layouts, usearch and LanceDB where they are
installed. Recall is reported for image queries and for text queries, which come from another distribution and find less.
Vectors are synthetic and CLIP-like (see vector_search/clip_like.py) unless real ones are given.

Every system is built once and kept in the cache folder; --rebuild builds anew. Each is measured in a fresh process, in
rounds over the paper's configuration and ours, so that neither has the quiet hour to itself; the median of the rounds
counts. Exact search and the other libraries, which are slow, are measured in the first round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from vector_search import ours, report
from vector_search.data import Data, from_files, synthetic
from vector_search.registry import SERVED, SYSTEMS
from vector_search.scenarios import NEEDS, SCENARIOS
from vector_search.systems import PAPER_TRAINING, Paper
from vector_search.targets import Results, targets

DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "knn-diffusion" / "benchmarks"
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "LANCE_CPU_THREADS",
    "RAYON_NUM_THREADS",
)


class Run:
    """One run over one data set: what was built, measured and left out."""

    def __init__(self, data: Data, *, rebuild: bool) -> None:
        self.data, self._rebuild = data, rebuild
        self.rows: dict[str, dict[str, dict[str, float]]] = {}
        self.scenarios: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self._built: dict[str, dict[str, float] | None] = {}

    def measure(self, names: list[str], rounds: int) -> None:
        """The systems' rows: medians over the rounds."""
        ready = [name for name in names if self._ready(name)]
        found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in ready}
        for number in range(rounds):
            for name in ready if number == 0 else [name for name in ready if name in ROUNDS]:
                log(f"measuring {name}, round {number + 1} of {rounds}")
                if (one := self._measured(name)) is not None:
                    found[name].append(one)
        for name, all_rounds in found.items():
            if all_rounds:
                built = self._built[SYSTEMS[name].built] or {}
                self.rows[name] = {label: row | built for label, row in medians(all_rounds).items()}

    def try_scenarios(self, names: list[str]) -> None:
        """Each once."""
        for name in names:
            if all(self._ready(needed, asked_by=name) for needed in NEEDS[name]):
                log(f"trying {name}")
                if (found := self._work("scenario", name, self._folder(SERVED), threads=1)) is not None:
                    self.scenarios[name] = found

    def _measured(self, name: str) -> dict[str, dict[str, float]] | None:
        folder = self._folder(name)
        found = self._work("measure", name, folder, threads=1)
        if found is None or "cpu_ms_batch" not in next(iter(found.values())):
            return found
        both = self._work("throughput", name, folder, threads=2) or {}
        for label, row in both.items():
            found[label]["queries_per_second_2"] = row["queries_per_second"]
        return found

    def _ready(self, name: str, asked_by: str | None = None) -> bool:
        """Whether the system is there and built; if not, why is kept."""
        system = SYSTEMS[name]
        why = system.missing()
        if why is None and system.built not in self._built:
            self._built[system.built] = self._build(name)
        if why is None and self._built[system.built] is None:
            why = "building it failed"
        if why is not None:
            self.left_out.setdefault(asked_by or name, why)
        return why is None

    def _build(self, name: str) -> dict[str, float] | None:
        folder, record = self._folder(name), self._folder(name) / "built.json"
        if record.exists() and not self._rebuild:
            return json.loads(record.read_text())
        if name in OURS:
            log(f"filling the store with {self.data.size:,} vectors, unless it is there")
            ours.shared_store(self.data)
        log(f"building {name}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        found = self._work("build", name, folder, threads=build_threads())
        if found is not None:
            record.write_text(json.dumps(found))
        return found

    def _folder(self, name: str) -> Path:
        return self.data.folder / "built" / SYSTEMS[name].built

    def _work(self, task: str, name: str, folder: Path, *, threads: int) -> dict[str, Any] | None:
        """What a fresh process found; None, and the reason kept, when it failed."""
        command = [
            sys.executable,
            "-m",
            "vector_search.worker",
            task,
            name,
            str(self.data.folder),
            "--built",
            str(folder),
        ]
        places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
        environment["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        self.left_out[name] = f"{task} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        log(f"{task} {name} failed:\n{done.stderr}")
        return None


OURS = {name for name, system in SYSTEMS.items() if isinstance(system, ours.Ours)}
ROUNDS = OURS | {name for name, system in SYSTEMS.items() if isinstance(system, Paper)}


def build_threads() -> int:
    """All cores, or as many as the environment says."""
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of every figure over the rounds that have it."""
    return {
        label: {
            key: median(one[label][key] for one in rounds if key in one[label])
            for key in {key: None for one in rounds for key in one[label]}
        }
        for label in rounds[0]
    }


def log(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def written(run: Run) -> dict[str, Any]:
    """The whole report as plain values."""
    results = Results(run.data.size, run.rows, run.scenarios)
    return {
        "machine": report.machine() | {"build threads": build_threads()},
        "command": " ".join(["python", "benchmarks/retrieval.py", *sys.argv[1:]]),
        "data": run.data.about,
        "training": {"paper": PAPER_TRAINING, "ours": ours.training()},
        "targets": [target.to_dict() for target in targets(results)],
        "rows": run.rows,
        "scenarios": run.scenarios,
        "left_out": run.left_out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*SYSTEMS, *SCENARIOS]
    parser.add_argument("--size", type=int, default=1_000_000, help="vectors to search, at most, when they are given")
    parser.add_argument("--embeddings", type=Path, help="real image embeddings, .npy, one a row")
    parser.add_argument("--text-embeddings", type=Path, help="texts' embeddings by the same encoder, .npy")
    parser.add_argument("--only", nargs="+", choices=known, metavar="ROW", help=f"any of {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each system; the median counts")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="vectors, true neighbors and built indexes")
    parser.add_argument("--rebuild", action="store_true", help="build the systems again")
    parser.add_argument("--output", type=Path, help="also write the report here as Markdown and, beside it, as JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of Markdown")
    asked = parser.parse_args()
    if asked.text_embeddings is not None and asked.embeddings is None:
        parser.error("--text-embeddings needs --embeddings: give both")
    if asked.size < 1_000 or asked.rounds < 1:
        parser.error("expected --size of at least 1000 and --rounds of at least 1")
    log("preparing vectors, queries and their true neighbors")
    data = (
        synthetic(asked.cache, asked.size)
        if asked.embeddings is None
        else from_files(asked.cache, asked.size, asked.embeddings, asked.text_embeddings)
    )
    log(f"{data.size:,} vectors; cosines {data.about.get('cosines')}")
    run, names = Run(data, rebuild=asked.rebuild), asked.only or known
    run.measure([name for name in SYSTEMS if name in names], asked.rounds)
    run.try_scenarios([name for name in SCENARIOS if name in names])
    found = written(run)
    if asked.output is not None:
        asked.output.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        asked.output.with_suffix(".md").write_text(report.to_markdown(found), encoding="utf-8")
    print(json.dumps(found) if asked.json else report.to_markdown(found))


if __name__ == "__main__":
    main()
