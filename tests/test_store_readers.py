"""Readers that may not write: a web server's user, a container with a read-only mount. They see what others commit."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_world import batch, everything, filled, id_of

from knn_diffusion.retrieval.store import Store

NOBODY = 65534
OURS = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent / "src"), OMP_NUM_THREADS="1")
READING = f"""
import os, sys
from pathlib import Path
from knn_diffusion.errors import StoreError
from knn_diffusion.retrieval.store import Store
sys.path.insert(0, {str(Path(__file__).parent)!r})
from store_world import everything
os.setgid({NOBODY}); os.setuid({NOBODY})
store = Store.open(Path(sys.argv[1]))
assert store.read_only
for _ in sys.stdin:
    try:
        print(" ".join(sorted(everything(store))), len(store.rows_of(["x"])), int(store.matching("id > ''").sum()), flush=True)
    except StoreError as error:
        print("error", error, flush=True)
"""

pytestmark = pytest.mark.skipif(
    not hasattr(os, "setuid") or os.geteuid() != 0, reason="only root can become a user without permissions"
)


@contextmanager
def reader(index: Path) -> Iterator[Callable[[], set[str]]]:
    """What a reader in another process sees whenever it is asked."""
    command = [sys.executable, "-c", READING, str(index)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=OURS) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask() -> set[str]:
            stdin.write("\n")
            stdin.flush()
            *found, unknown, matching = stdout.readline().split()
            assert (unknown, matching) == ("1", str(len(found))), found
            return set(found)

        yield ask
        stdin.close()


def keep_journal_mode(index: Path) -> None:
    """Leave the database as SQLite does when the last connection to one with a journal closes."""
    database = sqlite3.connect(index / "store.sqlite")
    database.execute("PRAGMA journal_mode=WAL")
    database.close()
    assert not (index / "store.sqlite-wal").exists()


@pytest.mark.parametrize("left", ["in one file", "in journal mode without a journal"])
def test_a_reader_sees_what_is_added_removed_and_compacted(left: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        index = Path(place) / "index"
        filled(index, range(5), range(5, 8)).close()
        if left != "in one file":
            keep_journal_mode(index)
        with reader(index) as ids:
            assert len(ids()) == 8
            for turn in range(2):
                with Store.open(index) as writer:
                    writer.append(*batch([100 + turn]))
                    assert id_of(100 + turn) in ids()
                    writer.remove([id_of(100 + turn), id_of(turn)])
                    assert id_of(100 + turn) not in ids()
                    writer.compact()
                    assert ids() == set(everything(writer))
                assert len(ids()) == 7 - turn
