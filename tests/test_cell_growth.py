"""A search index in cells stays through compactions: records keep their places, rows follow from the snapshot."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from knn_diffusion.errors import KnnDiffusionError
from knn_diffusion.retrieval import cell_engine, compaction, kept
from knn_diffusion.retrieval.cell_engine import CellEngine
from knn_diffusion.retrieval.dedup import OFF
from knn_diffusion.retrieval.engines import Allowed
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.kept import KeptIndex, Shape, cache_problem
from knn_diffusion.retrieval.plan import IndexConfig, Reach
from knn_diffusion.retrieval.segments import CompactedError
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

DIM = 16
TOY = EncoderIdentity(name="toy", fingerprint="f" * 16, dim=DIM)
EVERYWHERE = IndexConfig(exact_below=10, cells=8, image=Reach(probes=8, depth=60))
QUERIES = np.random.default_rng(5).standard_normal((4, DIM)).astype(np.float32)


def add(store: Store, numbers: range, seed: int = 0) -> None:
    """Images whose vectors follow from their numbers and the seed."""
    items = [
        Item(source=f"{n}.png", content=hashlib.sha256(f"{n} {seed}".encode()).hexdigest(), id=str(n)) for n in numbers
    ]
    store.append(items, vectors_of(numbers, seed))


def vectors_of(numbers: Iterable[int], seed: int = 0) -> np.ndarray:
    return np.stack([np.random.default_rng((n, seed)).standard_normal(DIM) for n in numbers]).astype(np.float32)


def filled(folder: Path | None, count: int = 300) -> Store:
    store = Store.create(folder, TOY)
    add(store, range(count // 2))
    add(store, range(count // 2, count))
    return store


def found(retriever: LocalRetriever, k: int = 9) -> list[list[str]]:
    return retriever.search(QUERIES, k).ids


def by_hand(store: Store, k: int = 9) -> list[list[str]]:
    rows = store.snapshot().live_rows
    stored = store.embeddings(rows).astype(np.float64)
    scores = QUERIES @ stored.T / np.linalg.norm(stored, axis=1)
    return [[item.id for item in store.items(rows[np.argsort(-one)[:k]])] for one in scores]


def in_cells(retriever: LocalRetriever) -> int:
    """Images that the cells hold, dead ones included."""
    assert isinstance(retriever._engine, CellEngine)
    return sum(part.index.ntotal for part in retriever._engine._parts)


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no image can be put into a cell, and no cell trained."""
    monkeypatch.setattr(cell_engine, "train_index", None)
    monkeypatch.setattr(cell_engine, "add_rows", None)


@pytest.mark.parametrize("layout", ["sq8", "fast-scan", "fast-scan-small", "paper"])
@pytest.mark.parametrize("in_memory", [False, True], ids=["mapped", "rows in memory"])
def test_a_compaction_leaves_the_cells_as_they_are(
    layout: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(None) as store:
        retriever = LocalRetriever(store, replace(EVERYWHERE, layout=layout, rows_in_memory=in_memory), OFF)
        retriever.prepare()
        engine = retriever._engine
        forbid_building(monkeypatch)
        for turn in (7, 8, 11):
            gone = [str(n) for n in range(turn, 300, 13)]
            store.remove(gone)
            assert found(retriever) == by_hand(store)
            store.compact()
            assert found(retriever) == by_hand(store)
            assert not set(gone) & set(retriever.search(QUERIES[:1], len(store)).ids[0])
            assert retriever.search(QUERIES[:1], len(store)).shortfall.tolist() == [0]
        assert retriever._engine is engine


def test_after_compactions_the_same_is_found_as_in_a_new_index(tmp_path: Path) -> None:
    with filled(tmp_path / "index") as store:
        retriever = LocalRetriever(store, EVERYWHERE, OFF)
        retriever.prepare()
        store.remove([str(n) for n in range(0, 150, 4)])
        store.compact()
        add(store, range(400, 420))
        store.remove([str(n) for n in range(1, 150, 4)] + ["405"])
        store.compact()
        (tmp_path / "copy").mkdir()
        store.copy_to(tmp_path / "copy")
        with Store.open(tmp_path / "copy") as copy:
            anew = LocalRetriever(copy, EVERYWHERE, OFF)
            assert found(retriever, 50) == found(anew, 50) == by_hand(store, 50)


def test_rows_that_lie_in_no_cell_yet_are_found_after_a_compaction() -> None:
    with filled(None) as store:
        retriever = LocalRetriever(store, EVERYWHERE, OFF)
        retriever.prepare()
        add(store, range(400, 420))
        assert found(retriever) == by_hand(store)
        store.remove(["3", "299", "400", "410"])
        store.compact()
        assert found(retriever, 40) == by_hand(store, 40)
        store.remove([str(n) for n in range(400, 420) if n not in (400, 410)])
        store.compact()
        assert found(retriever, 40) == by_hand(store, 40)
        add(store, range(430, 440))
        assert found(retriever, 40) == by_hand(store, 40)
        assert in_cells(retriever) == 300


@pytest.mark.parametrize("settings", [IndexConfig(), EVERYWHERE], ids=["exact", "cells"])
def test_images_compared_one_by_one_are_found_by_their_vectors_after_a_compaction(settings: IndexConfig) -> None:
    with filled(None) as store:
        retriever = LocalRetriever(store, settings, OFF)
        retriever.prepare()
        add(store, range(400, 460))
        assert retriever.search(vectors_of(range(400, 460)), 1).ids == [[str(n)] for n in range(400, 460)]
        for gone in (["3", "400", "430"], [str(n) for n in range(401, 411)]):
            store.remove(gone)
            store.compact()
            left = [n for n in range(411, 460) if n != 430]
            assert retriever.search(vectors_of(left), 1).ids == [[str(n)] for n in left]


def test_an_older_snapshot_is_searched_beside_a_newer_one() -> None:
    with filled(None) as store:
        retriever = LocalRetriever(store, EVERYWHERE, OFF)
        retriever.prepare()
        add(store, range(400, 410))
        old, expected = store.snapshot(), by_hand(store)
        assert found(retriever) == expected
        store.remove(["5", "402"])
        store.compact()
        for _ in range(2):
            assert found(retriever) == by_hand(store)
            rows = (
                retriever._search(old, None, OFF, drop_copies=False, with_vectors=False)
                .run(
                    QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True),
                    9,
                    [np.zeros(0, int)] * 4,
                    EVERYWHERE.image,
                )
                .rows
            )
            assert rows.tolist() == [
                [int(one) if int(one) < 400 else int(one) - 100 for one in ids] for ids in expected
            ]


def test_a_process_that_opens_the_index_after_a_compaction_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(tmp_path / "index") as store:
        LocalRetriever(store, EVERYWHERE, OFF).prepare()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "index" / "cache").iterdir()}
    forbid_building(monkeypatch)
    for turn in (3, 4):
        with Store.open(tmp_path / "index") as store:
            add(store, range(400 + turn, 500, 10))
            store.remove([str(n) for n in range(turn, 300, 17)])
            store.compact()
        with Store.open(tmp_path / "index") as store:
            retriever = LocalRetriever(store, EVERYWHERE, OFF)
            assert found(retriever, 40) == by_hand(store, 40)
            assert in_cells(retriever) == 300
        assert cache_problem(tmp_path / "index") is None
    assert {path.name: path.read_bytes() for path in (tmp_path / "index" / "cache").iterdir()} == kept


def test_cells_made_from_another_future_of_the_store_are_not_used(tmp_path: Path) -> None:
    filled(tmp_path / "index").close()
    shutil.copytree(tmp_path / "index", tmp_path / "backup")
    with Store.open(tmp_path / "index") as store:
        add(store, range(300, 330))
        LocalRetriever(store, EVERYWHERE, OFF).prepare()
    with Store.open(tmp_path / "backup") as store:
        add(store, range(300, 330), seed=1)
    shutil.copytree(tmp_path / "index" / "cache", tmp_path / "backup" / "cache")
    shape = Shape(layout="fast-scan", cells=8, dim=DIM)
    for name, parts in (("index", 1), ("backup", 0)):
        with Store.open(tmp_path / name) as store:
            assert len(KeptIndex.open(store, shape).parts) == parts
            assert found(LocalRetriever(store, EVERYWHERE, OFF)) == by_hand(store)


def test_cells_without_images_that_a_restored_store_holds_are_not_used(tmp_path: Path) -> None:
    with filled(tmp_path / "index") as store:
        LocalRetriever(store, EVERYWHERE, OFF).prepare()
    shutil.copytree(tmp_path / "index", tmp_path / "backup")
    with Store.open(tmp_path / "index") as store:
        store.remove([str(n) for n in range(0, 300, 3)])
        store.compact()
        retriever = LocalRetriever(store, EVERYWHERE, OFF)
        found(retriever)
        retriever.prepare()
        assert in_cells(retriever) == 200
    shutil.rmtree(tmp_path / "backup" / "cache")
    shutil.copytree(tmp_path / "index" / "cache", tmp_path / "backup" / "cache")
    with Store.open(tmp_path / "backup") as store:
        assert found(LocalRetriever(store, EVERYWHERE, OFF), 40) == by_hand(store, 40)


def test_what_was_purged_leaves_the_cells_in_the_background_when_it_is_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(tmp_path / "index") as store:
        retriever = LocalRetriever(store, EVERYWHERE, OFF)
        retriever.prepare()
        engine = retriever._engine
        forbid_building(monkeypatch)
        store.remove([str(n) for n in range(60)])
        store.compact()
        found(retriever)
        retriever.prepare()
        assert in_cells(retriever) == 300
        store.remove([str(n) for n in range(60, 70)])
        store.compact()
        assert found(retriever) == by_hand(store)
        retriever.prepare()
        assert in_cells(retriever) == 230
        assert retriever._engine is engine
        assert found(retriever, 40) == by_hand(store, 40)
    said = json.loads((tmp_path / "index" / "cache" / "search.json").read_text())
    assert len(said["parts"]) == 1
    assert cache_problem(tmp_path / "index") is None
    with Store.open(tmp_path / "index") as store:
        retriever = LocalRetriever(store, EVERYWHERE, OFF)
        assert found(retriever, 40) == by_hand(store, 40)
        assert in_cells(retriever) == 230


def test_a_snapshot_older_than_the_newest_rows_is_refused_instead_of_answered_short() -> None:
    with filled(None) as store:
        retriever = LocalRetriever(store, EVERYWHERE, OFF)
        retriever.prepare()
        add(store, range(400, 420))
        old = store.snapshot()
        store.remove([str(n) for n in range(400, 410)])
        add(store, range(500, 520))
        store.compact()
        assert found(retriever, 40) == by_hand(store, 40)  # this brings the newest rows, without the purged
        engine = retriever._engine
        assert isinstance(engine, CellEngine)
        with pytest.raises(CompactedError, match="take a new one"):
            engine.candidates(QUERIES, 9, old, Allowed(old.alive, old.records), EVERYWHERE.image)


def test_a_snapshot_older_than_what_left_the_cells_is_refused_instead_of_answered_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with filled(None) as store:
        retriever = LocalRetriever(store, EVERYWHERE, OFF)
        retriever.prepare()
        monkeypatch.setattr(cell_engine, "TAIL_ROWS", 8)
        for change in (
            lambda: store.remove([str(n) for n in range(100)]),
            lambda: (store.remove(["200"]), add(store, range(400, 420))),
        ):
            old = store.snapshot()
            change()
            store.compact()
            assert found(retriever) == by_hand(store)
            retriever.prepare()
            with pytest.raises(CompactedError, match="take a new one"):
                retriever._search(old, None, OFF, drop_copies=False, with_vectors=False).run(
                    QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True), 9, [np.zeros(0, int)] * 4, Reach(probes=8)
                )
            snapshots = iter([old])
            with monkeypatch.context() as late:
                late.setattr(store, "snapshot", lambda now=store.snapshot, those=snapshots: next(those, None) or now())
                assert found(retriever) == by_hand(store)
            assert next(snapshots, None) is None


def test_a_store_that_grows_and_shrinks_for_long_keeps_its_cells_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_engine, "TAIL_ROWS", 8)
    monkeypatch.setattr(compaction, "SEGMENT_ROWS", 32)
    with filled(None, 100) as store:
        retriever = LocalRetriever(store, EVERYWHERE, OFF)
        retriever.prepare()
        engine = retriever._engine
        for turn in range(20):
            add(store, range(100 + 10 * turn, 110 + 10 * turn))
            store.remove([str(n) for n in range(10 * turn, 10 * turn + 10)])
            if turn % 2:
                store.compact()
            assert found(retriever) == by_hand(store)
            retriever.prepare()
            assert found(retriever) == by_hand(store)
            assert in_cells(retriever) <= 1.25 * 110 + 10
        assert retriever._engine is engine


def test_a_store_of_an_earlier_version_gets_its_history_when_cells_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "index").close()
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    raw.executescript("DROP TABLE history")
    raw.close()
    with Store.open(tmp_path / "index") as store:
        assert store.history(store.snapshot().age) is None
        LocalRetriever(store, EVERYWHERE, OFF).prepare()
        assert store.history(store.snapshot().age) is not None
    forbid_building(monkeypatch)
    with Store.open(tmp_path / "index") as store:
        assert found(LocalRetriever(store, EVERYWHERE, OFF)) == by_hand(store)


def test_every_append_and_compaction_is_a_link_of_the_history() -> None:
    with filled(None, 20) as one, filled(None, 20) as other:
        ages = [one.snapshot().age]
        add(one, range(20, 25))
        ages.append(one.snapshot().age)
        one.remove(["3"])
        assert one.snapshot().age == ages[-1]
        one.compact()
        ages.append(one.snapshot().age)
        links = [one.history(age) for age in ages]
        assert ages == [20, 25, 26]
        assert len({*links, None}) == 4
        add(other, range(20, 25))
        other.remove(["4"])
        other.compact()
        assert [other.history(age) for age in ages[:2]] == links[:2]
        assert other.history(26) != links[2]
        assert one.history(24) is None


def test_processes_that_keep_cells_at_once_keep_them_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_engine, "TAIL_ROWS", 8)
    monkeypatch.setattr(cell_engine, "KEPT_ROWS", 1)
    with filled(tmp_path / "index") as store:
        retrievers = [LocalRetriever(store, EVERYWHERE, OFF) for _ in range(4)]
        for turn in range(6):
            add(store, range(400 + 10 * turn, 410 + 10 * turn))
            threads = [threading.Thread(target=lambda one=one: (found(one), one.prepare())) for one in retrievers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert cache_problem(tmp_path / "index") is None
            assert not list((tmp_path / "index" / "cache").glob("*tmp*"))
    with Store.open(tmp_path / "index") as store:
        assert found(LocalRetriever(store, EVERYWHERE, OFF), 40) == by_hand(store, 40)


def test_what_another_version_kept_is_no_damage(tmp_path: Path) -> None:
    with filled(tmp_path / "index") as store:
        LocalRetriever(store, EVERYWHERE, OFF).prepare()
    facts = tmp_path / "index" / "cache" / "search.json"
    said = json.loads(facts.read_text())
    facts.write_text(json.dumps(said | {"format": 2}))
    assert cache_problem(tmp_path / "index") is None
    with Store.open(tmp_path / "index") as store:
        assert found(LocalRetriever(store, EVERYWHERE, OFF)) == by_hand(store)
    assert json.loads(facts.read_text()) == said


def test_a_writer_that_never_gets_its_turn_keeps_nothing_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "LOCK_SECONDS", 0.1)
    with filled(tmp_path / "index") as store:
        (tmp_path / "index" / "cache").mkdir()
        retriever = LocalRetriever(store, EVERYWHERE, OFF)
        with FileLock(tmp_path / "index" / "cache" / kept.LOCK):
            retriever.prepare()
            assert found(retriever) == by_hand(store)
            with pytest.raises(KnnDiffusionError, match=r"new cells could not be kept \(.*search\.lock.*as before"):
                retriever.retrain()
        assert [path.name for path in (tmp_path / "index" / "cache").iterdir()] == [kept.LOCK]
        assert found(retriever) == by_hand(store)


def test_a_kept_part_that_another_process_deletes_as_it_is_read_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(tmp_path / "index") as store:
        LocalRetriever(store, EVERYWHERE, OFF).prepare()
        whole = kept._whole

        def deleted(folder: Path, digest: str) -> bool:
            there = whole(folder, digest)
            kept._path(folder, digest).unlink(missing_ok=True)
            return there

        monkeypatch.setattr(kept, "_whole", deleted)
        assert found(LocalRetriever(store, EVERYWHERE, OFF)) == by_hand(store)
