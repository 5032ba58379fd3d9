"""One process writes at a time; another one is told who, and a process that died is no obstacle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from store_world import batch, everything, filled, id_of

from knn_diffusion.errors import StoreError
from knn_diffusion.retrieval import database
from knn_diffusion.retrieval.holder import Holder, holder, noted
from knn_diffusion.retrieval.store import Store

WRITING = """
import sys
from pathlib import Path
from knn_diffusion.retrieval.store import Store
with Store.open(Path(sys.argv[1])) as store, store.live.transaction() as change:
    change.database.execute("DELETE FROM previews")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.05)


@contextmanager
def another_writer(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the midst of a transaction on the store."""
    command = [sys.executable, "-c", WRITING, str(folder), "--as", "my cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_told_which_process_writes_and_a_killed_one_is_no_obstacle(tmp_path: Path) -> None:
    filled(tmp_path / "index", range(3)).close()
    with another_writer(tmp_path / "index") as process, Store.open(tmp_path / "index") as store:
        message = (
            rf"index is in use by another writer, process {process.pid} on \S+ since 2\d{{3}}-\d\d-\d\d \d\d:\d\d:\d\d "
            rf"\(-c .*index --as 'my cat'\): wait until it has finished, or end that process: what it has saved is kept$"
        )
        with pytest.raises(StoreError, match=message):
            store.append(*batch(range(3, 5)))
        process.kill()
        process.wait()
        assert (tmp_path / "index" / "writer.json").is_file()
        store.append(*batch(range(3, 5)))
        assert set(everything(store)) == {id_of(number) for number in range(5)}
        assert everything(store)[id_of(0)][3] == b"picture 0"
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["segments", "store.sqlite"]


def test_the_note_of_a_process_that_is_gone_names_nobody(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    note = {"pid": process.pid, "host": Holder.this().host, "since": "yesterday", "command": "knn-diffusion"}
    (tmp_path / "writer.json").write_text(json.dumps(note))
    assert holder(tmp_path) == ": wait until it has finished"
    (tmp_path / "writer.json").write_text(json.dumps(note | {"host": "elsewhere"}))
    assert holder(tmp_path).startswith(f", process {process.pid} on elsewhere since yesterday (knn-diffusion)")


@pytest.mark.parametrize("note", ["", "{", '{"pid": 1}', "[]", '{"pid": "x", "host": 3, "since": [], "command": null}'])
def test_a_note_that_says_nothing_is_passed_over(tmp_path: Path, note: str) -> None:
    (tmp_path / "writer.json").write_text(note.replace("3", json.dumps(Holder.this().host)))
    assert holder(tmp_path) == ": wait until it has finished"


def test_a_note_is_there_while_the_block_lasts(tmp_path: Path) -> None:
    with noted(tmp_path):
        assert f"process {os.getpid()} on" in holder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_no_note_can_be_written_there_is_none(tmp_path: Path) -> None:
    with noted(tmp_path / "missing"):
        assert holder(tmp_path / "missing") == ": wait until it has finished"
