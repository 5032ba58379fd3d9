"""After growth the cells tell how well they fit later images, and are trained again while searches go on in the old ones."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knn_diffusion.cli import main
from knn_diffusion.errors import KnnDiffusionError, StoreError, UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.image_index import index as index_module
from knn_diffusion.image_index.tuning import report, tune
from knn_diffusion.retrieval import cell_engine, kept
from knn_diffusion.retrieval.cell_engine import CellEngine
from knn_diffusion.retrieval.dedup import OFF
from knn_diffusion.retrieval.drift import MUCH_FARTHER, drift
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.interchange import faiss_file
from knn_diffusion.retrieval.kept import cache_problem
from knn_diffusion.retrieval.plan import CELL_LAYOUTS, IndexConfig, Reach
from knn_diffusion.retrieval.ranking import RowsInMemory
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

DIM = 32
TOY = EncoderIdentity(name="toy", fingerprint="f" * 16, dim=DIM)
SETTINGS = IndexConfig(exact_below=10, cells=64, image=Reach(probes=6, depth=20))
ALL = replace(SETTINGS, image=Reach(probes=64, depth=60))


def images_of(topics: int, count: int, seed: int) -> np.ndarray:
    """Images around 30 centres; another number of `topics` gives other centres."""
    centres = np.random.default_rng(topics).standard_normal((30, DIM))
    random = np.random.default_rng(seed)
    return (centres[random.integers(0, 30, count)] + 0.4 * random.standard_normal((count, DIM))).astype(np.float32)


def add(store: Store, vectors: np.ndarray) -> None:
    first = store.snapshot().num_records
    contents = [hashlib.sha256(str(first + n).encode()).hexdigest() for n in range(len(vectors))]
    store.append(
        [Item(source=f"{first + n}", content=one, id=str(first + n)) for n, one in enumerate(contents)], vectors
    )


def filled(folder: Path | None, count: int = 1500) -> Store:
    store = Store.create(folder, TOY)
    add(store, images_of(1, count, 0))
    return store


def grown(folder: Path | None, settings: IndexConfig = SETTINGS, topics: int = 2) -> tuple[Store, LocalRetriever]:
    """A store with an index of its first images, and later ones."""
    store = filled(folder)
    retriever = LocalRetriever(store, settings, OFF)
    retriever.prepare()
    add(store, images_of(topics, 500, 7))
    return store, retriever


def nearest(store: Store, query: np.ndarray, k: int = 5) -> list[str]:
    rows = store.snapshot().live_rows
    stored = store.embeddings(rows).astype(np.float64)
    return [item.id for item in store.items(rows[np.argsort(-(stored @ query) / np.linalg.norm(stored, axis=1))[:k]])]


# How well cells fit


@pytest.mark.parametrize("layout", CELL_LAYOUTS)
def test_new_topics_lie_far_from_their_cells_and_more_of_the_same_does_not(layout: Any) -> None:
    settings = replace(SETTINGS, layout=layout)
    _, retriever = grown(None, settings)
    other = drift(retriever)
    assert other is not None
    assert (other.count, other.later, other.share) == (2000, 500, 0.25)
    assert other.farther > 2
    assert other.worth_training
    _, retriever = grown(None, settings, topics=1)
    same = drift(retriever)
    assert same is not None
    assert same.farther < MUCH_FARTHER
    assert not same.worth_training
    assert str(same).startswith("500 of 2,000 images came after the 64 cells were trained; they lie 1.")


def test_the_distance_is_that_to_the_centre_of_the_own_cell() -> None:
    store, retriever = grown(None, replace(SETTINGS, layout="sq8"))
    found = drift(retriever, sample=5000)
    assert found is not None
    engine = retriever._engine
    assert isinstance(engine, CellEngine)
    centres = engine.trained[0].quantizer.reconstruct_n(0, 64).astype(np.float64)
    stored = store.embeddings(np.arange(2000)).astype(np.float64)
    cosines = (stored / np.linalg.norm(stored, axis=1, keepdims=True)) @ centres.T
    far = 1 - cosines.max(1)
    assert found.earlier_distance == pytest.approx(far[:1500].mean(), abs=1e-4)
    assert found.later_distance == pytest.approx(far[1500:].mean(), abs=1e-4)


def test_a_few_later_images_are_no_reason_to_train_again() -> None:
    with filled(None) as store:
        retriever = LocalRetriever(store, SETTINGS, OFF)
        retriever.prepare()
        assert drift(retriever) is None
        add(store, images_of(2, 20, 7))
        found = drift(retriever)
        assert found is not None
        assert found.farther > 2
        assert not found.worth_training


def test_an_index_much_larger_than_its_cells_is_worth_training_again(tmp_path: Path) -> None:
    with filled(tmp_path / "index", 300) as store:
        settings = replace(SETTINGS, cells=None)
        retriever = LocalRetriever(store, settings, OFF)
        cells = retriever.prepare().cells
        add(store, images_of(1, 12_000, 5))
        assert (cells, retriever.plan().cells, retriever.new_plan().cells) == (64, 64, 512)
        found = drift(retriever)
        assert found is not None
        assert found.worth_training
        monkey = LocalRetriever(store, settings, OFF)
        monkey.prepare()
        assert isinstance(monkey._engine, CellEngine)
        assert monkey._engine.cells == 64


def test_the_drift_is_known_without_the_images_in_cells_and_after_a_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, retriever = grown(tmp_path / "index")
    with store:
        before = drift(retriever)
        store.remove([str(n) for n in range(0, 1500, 3)])
        store.compact()
    monkeypatch.setattr(kept.KeptIndex, "load_parts", None)
    with Store.open(tmp_path / "index") as store:
        after = drift(LocalRetriever(store, SETTINGS, OFF))
        assert before is not None
        assert after is not None
        assert (after.count, after.later) == (1500, 500)
        assert after.farther == pytest.approx(before.farther, rel=0.1)


def test_cells_whose_images_are_all_gone_are_worth_training_again(tmp_path: Path) -> None:
    store, retriever = grown(tmp_path / "index")
    store.remove([str(n) for n in range(1500)])
    found = drift(retriever)
    assert found is not None
    assert (found.count, found.later, found.earlier_distance) == (500, 500, None)
    assert found.worth_training
    assert str(found).startswith("none of the images that the 64 cells were trained on is left")
    growth = report(ImageIndex(store, settings=SETTINGS), k=5, sample=50).growth
    assert growth is not None
    assert (growth.earlier_recall, growth.worth_training) == (None, True)
    assert "for images of before" not in str(growth)


def test_where_there_are_no_cells_there_is_no_drift(tmp_path: Path) -> None:
    with filled(tmp_path / "index") as store:
        assert drift(LocalRetriever(store)) is None
        assert drift(LocalRetriever(store, SETTINGS)) is None
        assert not (tmp_path / "index" / "cache").exists()


def test_a_report_tells_recall_before_and_after_the_training(tmp_path: Path) -> None:
    store, _ = grown(tmp_path / "index")
    index = ImageIndex(store, settings=SETTINGS)
    for turn in range(2):
        growth = report(index, k=5, sample=150).growth
        if turn:
            assert growth is None
            break
        assert growth is not None
        assert growth.worth_training
        assert growth.earlier_recall > 0.95
        assert growth.later_recall <= 1
        assert 1 < growth.imbalance < 64
        text = report(index, k=5, sample=150).to_markdown()
        assert "Growth: 500 of 2,000 images came after the 64 cells were trained; they lie" in text
        assert text.endswith("Train again: index tune INDEX --retrain.\n")
        assert json.loads(json.dumps(report(index, k=5, sample=50).to_dict()))["growth"]["worth_training"] is True
        tune(index, target=0.9, k=5, sample=50, retrain=True)


# Training again


def test_training_again_fits_the_later_images(tmp_path: Path) -> None:
    store, retriever = grown(tmp_path / "index", ALL)
    with store:
        query = images_of(2, 1, 9)
        before = drift(retriever)
        add(store, images_of(2, 1000, 3))
        retriever.retrain()
        assert drift(retriever) is None
        add(store, images_of(2, 100, 11))
        after = drift(retriever)
        assert before is not None
        assert after is not None
        assert after.farther < MUCH_FARTHER < before.farther
        assert retriever.search(query, 5).ids == [nearest(store, query[0])]
    assert cache_problem(tmp_path / "index") is None
    assert sorted(path.suffix for path in (tmp_path / "index" / "cache").iterdir()) == [
        ".faiss",
        ".faiss",
        ".json",
        ".lock",
    ]


def test_a_process_that_opens_the_index_after_training_again_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, retriever = grown(tmp_path / "index", replace(ALL, cells=None))
    with store:
        old = retriever.plan().cells
        add(store, images_of(2, 6000, 3))
        new = retriever.retrain().cells
        assert new > old
    monkeypatch.setattr(cell_engine, "train_index", None)
    monkeypatch.setattr(cell_engine, "add_rows", None)
    with Store.open(tmp_path / "index") as store:
        again = LocalRetriever(store, replace(ALL, cells=None), OFF)
        assert again.prepare().cells == new
        index, _ = faiss_file.faiss_index(store, store.snapshot(), replace(ALL, cells=None))
        assert index.ntotal == 8000


def test_searches_go_on_in_the_old_cells_until_the_new_ones_are_complete(tmp_path: Path) -> None:
    store, retriever = grown(tmp_path / "index", ALL)
    query, old, heard = images_of(2, 1, 9), retriever._engine, list[str]()
    with store:

        def look(what: str, done: int, total: int) -> None:
            heard.append(what)
            assert retriever._engine is old
            assert retriever.search(query, 5).ids == [nearest(store, query[0])]
            with Store.open(tmp_path / "index", read_only=True) as other:
                elsewhere = LocalRetriever(other, ALL, OFF)
                assert elsewhere.search(query, 5).ids == [nearest(store, query[0])]
                assert elsewhere.trained()[1] == 1500

        retriever.retrain(look)
        assert heard == ["training 64 cells", "training 64 cells", "putting images into cells"]
        assert retriever._engine is not old
        assert retriever.search(query, 5).ids == [nearest(store, query[0])]


def test_another_process_changes_over_when_the_new_cells_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, retriever = grown(tmp_path / "index", ALL)
    query = images_of(2, 1, 9)
    with store, Store.open(tmp_path / "index") as other:
        serving = LocalRetriever(other, ALL, OFF)
        serving.search(query, 5)
        old = serving._engine
        retriever.retrain()
        monkeypatch.setattr(cell_engine, "train_index", None)
        assert serving.search(query, 5).ids == [nearest(store, query[0])]
        serving.prepare()
        assert serving._engine is not old
        assert serving.trained() is not None
        assert serving.trained()[1] == 2000
        assert serving.search(query, 5).ids == [nearest(store, query[0])]


def test_an_engine_whose_cells_were_replaced_does_not_put_its_own_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_engine, "TAIL_ROWS", 8)
    monkeypatch.setattr(cell_engine, "KEPT_ROWS", 10)
    store, retriever = grown(tmp_path / "index", ALL)
    with store:
        old = retriever._engine
        assert isinstance(old, CellEngine)
        retriever.retrain()
        facts = tmp_path / "index" / "cache" / "search.json"
        new = facts.read_bytes()
        old._absorb(store.snapshot())
        assert facts.read_bytes() == new
        assert cache_problem(tmp_path / "index") is None
        assert len(list(facts.parent.iterdir())) == 4


def test_training_again_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done > 1200:
            raise StoppedError

    monkeypatch.setattr(cell_engine, "PART_ROWS", 500)
    store, retriever = grown(tmp_path / "index", ALL)
    with store:
        query = images_of(2, 1, 9)
        with pytest.raises(StoppedError):
            retriever.retrain(stop)
        assert retriever.search(query, 5).ids == [nearest(store, query[0])]
        assert cache_problem(tmp_path / "index") is None
        heard = list[tuple[str, int]]()
        monkeypatch.setattr(cell_engine, "train_index", None)
        retriever.retrain(lambda what, done, total: heard.append((what, done)))
        assert heard == [("putting images into cells", 1500), ("putting images into cells", 2000)]
        assert retriever.search(query, 5).ids == [nearest(store, query[0])]
        assert len(list((tmp_path / "index" / "cache").iterdir())) == 4


def test_training_again_begins_anew_when_many_images_came_since_the_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        raise StoppedError

    monkeypatch.setattr(cell_engine, "PART_ROWS", 500)
    store, retriever = grown(tmp_path / "index", ALL)
    with store:
        with pytest.raises(StoppedError):
            retriever.retrain(lambda what, done, total: stop(what, done, total) if done > 600 else None)
        for count, trained in ((150, 2000), (100, 2250)):
            add(store, images_of(3, count, trained))
            with pytest.raises(StoppedError):
                retriever.retrain(lambda what, done, total: stop(what, done, total) if done > 600 else None)
            said = kept.read_facts(tmp_path / "index" / "cache", kept.RETRAINING)
            assert said is not None
            assert said["trained_records"] == trained
        retriever.retrain()
        assert drift(retriever) is None


def test_a_full_disk_leaves_the_old_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, retriever = grown(tmp_path / "index", ALL)
    old = {path.name: path.read_bytes() for path in (tmp_path / "index" / "cache").iterdir()}
    with store:
        with monkeypatch.context() as full:
            full.setattr(kept.KeptIndex, "_save", lambda *_: None)
            with pytest.raises(KnnDiffusionError, match="could not be kept .*the index is searched as before"):
                retriever.retrain()
        assert {name: (tmp_path / "index" / "cache" / name).read_bytes() for name in old} == old
        assert cache_problem(tmp_path / "index") is None
        retriever.retrain()
        assert drift(retriever) is None


def test_new_cells_that_are_not_all_on_the_disk_do_not_take_the_others_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_engine, "PART_ROWS", 500)
    store, retriever = grown(tmp_path / "index", ALL)
    query, save, saved = images_of(2, 1, 9), kept.KeptIndex._save, list[int]()

    def until_it_is_full(self: kept.KeptIndex, index: Any, folder: Path | None) -> str | None:
        saved.append(index.ntotal)
        return None if len(saved) > 2 else save(self, index, folder)

    with store:
        with monkeypatch.context() as full:
            full.setattr(kept.KeptIndex, "_save", until_it_is_full)
            with pytest.raises(KnnDiffusionError, match="the index is searched as before"):
                retriever.retrain()
        assert saved == [0, 500, 500, 2000]
        assert cache_problem(tmp_path / "index") is None
        assert retriever.search(query, 5).ids == [nearest(store, query[0])]
        retriever.retrain()
        assert retriever.search(query, 5).ids == [nearest(store, query[0])]
    with Store.open(tmp_path / "index") as store:
        assert LocalRetriever(store, ALL, OFF).search(query, 5).ids == [nearest(store, query[0])]


def test_training_before_the_first_search_keeps_rows_in_memory_that_shall_be() -> None:
    store = filled(None)
    retriever = LocalRetriever(store, replace(ALL, rows_in_memory=True), OFF)
    retriever.retrain()
    assert isinstance(retriever._vectors, RowsInMemory)
    query = images_of(1, 1, 9)
    assert retriever.search(query, 5).ids == [nearest(store, query[0])]


def test_what_cannot_be_trained_again_is_said(tmp_path: Path) -> None:
    filled(tmp_path / "index").close()
    nothing = "one of 1,500 images compares them all: there is nothing to train"
    with ImageIndex.open(tmp_path / "index") as index, pytest.raises(UsageError, match=nothing):
        index.retrain()
    fixed = ImageIndex.open(tmp_path / "index", settings=SETTINGS, read_only=True)
    with fixed as index, pytest.raises(StoreError, match="is read-only: save a copy of it"):
        index.retrain()


def test_training_again_in_memory_serves_the_new_cells() -> None:
    store, retriever = grown(None, ALL)
    old, query = retriever._engine, images_of(2, 1, 9)
    retriever.retrain()
    assert retriever._engine is not old
    assert drift(retriever) is None
    assert retriever.search(query, 5).ids == [nearest(store, query[0])]


# The command line


def test_the_command_trains_again_and_the_report_tells_the_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(index_module, "stored_settings", lambda _: SETTINGS)
    store, _ = grown(tmp_path / "index")
    store.close()
    place = str(tmp_path / "index")
    assert main(["index", "report", place, "-k", "5", "--sample", "60"]) == 0
    assert "Train again: index tune INDEX --retrain." in capsys.readouterr().out
    assert main(["index", "tune", place, "-k", "5", "--sample", "60", "--retrain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"][0]["modality"] == "image"
    assert main(["index", "report", place, "-k", "5", "--sample", "60", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["growth"] is None
