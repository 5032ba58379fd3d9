"""An index can look after its removed images itself, in the background."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from test_cell_growth import EVERYWHERE, QUERIES, add, filled

from knn_diffusion.errors import KnnDiffusionError, StoreError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.retrieval import cell_engine
from knn_diffusion.retrieval.store import Store


def test_an_index_that_keeps_itself_compact_compacts_when_it_is_worth_it(tmp_path: Path) -> None:
    with filled(tmp_path / "index", 400) as store:
        index = ImageIndex(store, settings=EVERYWHERE)
        upkeep = index.keep_compact()
        index.remove([str(n) for n in range(30)])
        upkeep.wait()
        assert store.snapshot().num_rows == 400
        index.remove([str(n) for n in range(30, 60)])
        upkeep.wait()
        assert upkeep.problem is None
        assert store.snapshot().num_rows == len(index) == 340
        assert index.keep_compact() is upkeep
        assert store.problems() == []


def test_an_index_that_is_compacted_while_it_is_saved_is_saved_as_it_is_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = Store.facts

    def compacted(store: Store, *given: Any) -> Any:
        monkeypatch.setattr(Store, "facts", facts)
        store.remove([str(n) for n in range(30)])
        store.compact()
        return facts(store, *given)

    with filled(tmp_path / "index", 100) as store:
        index = ImageIndex(store, settings=EVERYWHERE)
        monkeypatch.setattr(Store, "facts", compacted)
        index.save(tmp_path / "copy")
        assert len(index) == 70
        with ImageIndex.open(tmp_path / "copy") as copy:
            assert copy.ids == index.ids
            copy.check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "index"]


def test_what_is_removed_during_a_compaction_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact, turns = Store.compact, iter([range(60, 120), range(120, 140)])

    def slow(store: Store) -> None:
        compact(store)
        index.remove([str(n) for n in next(turns)])

    with filled(tmp_path / "index", 400) as store:
        index = ImageIndex(store, settings=EVERYWHERE)
        upkeep = index.keep_compact()
        monkeypatch.setattr(Store, "compact", slow)
        index.remove([str(n) for n in range(60)])
        upkeep.wait()
        assert (store.snapshot().num_rows, len(index)) == (280, 260)


def test_a_compaction_that_changes_nothing_is_not_begun_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = list[int]()
    monkeypatch.setattr(Store, "compact", lambda store: begun.append(len(store)))
    with filled(tmp_path / "index", 100) as store:
        index = ImageIndex(store, settings=EVERYWHERE)
        upkeep = index.keep_compact()
        for number in range(2):
            index.remove([str(n) for n in range(30 * number, 30 * number + 30)])
            upkeep.wait()
        assert begun == [70, 40]


def test_what_stopped_a_compaction_in_the_background_is_said_and_the_next_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise KnnDiffusionError("the disk is full")

    with filled(tmp_path / "index", 100) as store:
        index = ImageIndex(store, settings=EVERYWHERE)
        upkeep = index.keep_compact()
        with monkeypatch.context() as disk:
            disk.setattr(Store, "compact", full)
            index.remove([str(n) for n in range(30)])
            upkeep.wait()
        assert str(upkeep.problem) == "the disk is full"
        index.remove(["40"])
        upkeep.wait()
        assert upkeep.problem is None
        assert store.snapshot().num_rows == 69


def test_searches_see_whole_states_while_an_index_keeps_itself_compact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_engine, "TAIL_ROWS", 16)
    wrong, done = list[str](), threading.Event()
    with filled(None, 200) as store:
        index = ImageIndex(store, settings=EVERYWHERE)
        upkeep = index.keep_compact()

        def search() -> None:
            try:
                while not done.is_set():
                    numbers = {int(one) for one in index.search(QUERIES[:1], 200, deduplicate=False).ids[0]}
                    if len(numbers) < 200 or max(numbers) // 40 - min(numbers) // 40 > 5:
                        wrong.append(f"{len(numbers)} from {min(numbers)} to {max(numbers)}")
            except Exception as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=search) for _ in range(2)]
        for thread in threads:
            thread.start()
        for turn in range(12):
            add(store, range(200 + 40 * turn, 240 + 40 * turn))
            index.remove([str(n) for n in range(40 * turn, 40 * turn + 40)])
        done.set()
        for thread in threads:
            thread.join()
        upkeep.wait()
        assert store.snapshot().generation >= 2
    assert wrong == []


def test_a_read_only_index_does_not_keep_itself_compact(tmp_path: Path) -> None:
    filled(tmp_path / "index", 100).close()
    with (
        ImageIndex.open(tmp_path / "index", read_only=True) as index,
        pytest.raises(StoreError, match="is read-only: save a copy of it"),
    ):
        index.keep_compact()
