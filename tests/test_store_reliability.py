"""What the store promises to people whose machines crash, fill up and rot; `scripts/torture` asks the same for longer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")


def torture(script: str, *arguments: object, library: Path | None = None) -> dict[str, Any]:
    environment = dict(os.environ, PYTHONPATH=str(TESTS.parent / "src"), OMP_NUM_THREADS="1")
    environment |= {"LD_PRELOAD": str(library)} if library is not None else {}
    command = [sys.executable, str(TESTS / f"torture_{script}.py"), *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such: what is killed is the process, not the machine, and nothing waits for a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="store-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that strikes at one call of a process."""
    if not sys.platform.startswith("linux") or COMPILER is None:
        pytest.skip("striking at one system call needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = str(TESTS / "torture_faults.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"], check=True, timeout=120)
    return library


def test_a_writer_killed_at_any_call_loses_and_tears_nothing(place: Path, faults: Path) -> None:
    sweep = ("sweep", "--folder", place, "--actions", "kill,tear", "--stride", 3)
    report = torture("kills", *sweep, library=faults)
    assert report["wrong"] == []
    assert report["calls"] >= 80
    assert min(report["kill"], report["tear"]) >= 15
    assert report["control_failed"] >= 3  # the writer that must fail does


def test_any_call_that_fails_leaves_the_old_or_the_new_state_and_the_next_try_succeeds(
    place: Path, faults: Path
) -> None:
    report = torture("kills", "sweep", "--folder", place, "--actions", "ENOSPC,EIO", library=faults)
    assert report["wrong"] == []
    assert report["ENOSPC"] + report["EIO"] == report["calls"]
    assert report["refused"] >= 40  # most failures reach whoever asked; the others cost nothing, as a file left over


def test_a_writer_killed_at_any_moment_loses_and_tears_nothing(place: Path) -> None:
    report = torture("kills", "random", "--folder", place, "--kills", 12)
    assert report["wrong"] == []
    assert report["acknowledged"] >= 5


def test_damage_is_refused_and_never_told_as_truth(place: Path) -> None:
    report = torture("damage", "store", "--folder", place, "--trials", 500)
    assert report["wrong"] == []
    assert report["refused"] >= 250
    assert report["as before"] >= 50  # the damage was where nothing is, so the trials are not all too rough
    assert report["slowest_seconds"] <= 30  # no damage makes it hang


def test_a_damaged_or_missing_search_index_is_made_again(place: Path) -> None:
    report = torture("damage", "cache", "--folder", place, "--trials", 8)
    assert report["wrong"] == []
    assert report["files"] >= 2


def test_eight_searchers_beside_a_writer_and_a_compaction_see_only_whole_states(place: Path) -> None:
    report = torture("readers", "--folder", place, "--seconds", 2)
    assert report["wrong"] == []
    assert report["searches"] >= 8
    assert report["compactions"] >= 1
