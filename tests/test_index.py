"""Search returns what comparing every vector returns: exactly k, by cosine, after exclusion and de-duplication."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from knn_diffusion.errors import FingerprintError, StoreError, UsageError
from knn_diffusion.retrieval import cell_engine, cell_join, cells, neighbors
from knn_diffusion.retrieval.cell_engine import CellEngine
from knn_diffusion.retrieval.dedup import OFF, DedupConfig
from knn_diffusion.retrieval.engines import ExactEngine
from knn_diffusion.retrieval.index import LocalRetriever, Retriever
from knn_diffusion.retrieval.kept import cache_problem
from knn_diffusion.retrieval.neighbors import neighbors_of, self_neighbors
from knn_diffusion.retrieval.plan import IndexConfig, Reach
from knn_diffusion.retrieval.ranking import widened
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

DIM = 16
TOY = EncoderIdentity(name="toy", fingerprint="f" * 16, dim=DIM)
CELLS = IndexConfig(exact_below=10, cells=8, image=Reach(probes=4, depth=8), text=Reach(probes=8, depth=8))
COPIES = DedupConfig(cosine=0.9, manhattan=None)


def vectors_of(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((12, DIM))
    return (centres[random.integers(0, 12, count)] + 0.7 * random.standard_normal((count, DIM))).astype(np.float32)


def add(store: Store, vectors: np.ndarray, first: int = 0, level: int | None = None) -> list[str]:
    numbers = range(first, first + len(vectors))
    contents = [hashlib.sha256(str(n).encode()).hexdigest() for n in numbers]
    items = [Item(source=f"{n}.png", content=one, id=f"image{n}") for n, one in zip(numbers, contents, strict=True)]
    thumbnails = None if level is None else np.full((len(vectors), 192), level, np.uint8)
    store.append(items, vectors, thumbnails)
    return [item.id for item in items]


def filled(folder: Path | None, count: int = 300) -> Store:
    store = Store.create(folder, TOY)
    vectors = vectors_of(count)
    add(store, vectors[: count // 2])
    add(store, vectors[count // 2 :], count // 2)
    return store


def cosines(store: Store, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = store.snapshot().live_rows
    stored = store.embeddings(rows).astype(np.float64)
    scores = stored @ query / np.linalg.norm(stored, axis=1) / np.linalg.norm(query)
    order = np.lexsort((rows, -scores))
    return rows[order], scores[order]


def by_hand(
    store: Store, query: np.ndarray, k: int, gone: set[str], threshold: float | None
) -> tuple[list[str], list[float]]:
    """What search must answer, written as plainly as possible."""
    rows, scores = cosines(store, query)
    stored = store.embeddings(rows).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    ids = [item.id for item in store.items(rows)]
    kept: list[int] = []
    for place, id_ in enumerate(ids):
        copy = threshold is not None and any(stored[place] @ stored[other] > threshold for other in kept)
        if id_ not in gone and not copy and len(kept) < k:
            kept.append(place)
    return [ids[place] for place in kept], [float(scores[place]) for place in kept]


@pytest.mark.parametrize("settings", [IndexConfig(), CELLS], ids=["exact", "cells"])
@pytest.mark.parametrize("rule", [OFF, COPIES], ids=["all", "without copies"])
def test_search_equals_comparing_everything(settings: IndexConfig, rule: DedupConfig) -> None:
    with filled(None) as store:
        retriever: Retriever = LocalRetriever(store, replace(settings, image=Reach(probes=8, depth=40)), rule)
        queries = vectors_of(5, seed=1)
        gone = [{"image3", "unknown"}, set(), {f"image{n}" for n in range(0, 300, 2)}, set(), {"image0"}]
        found = retriever.search(queries, 7, exclude_ids=gone)
        assert found.shortfall.tolist() == [0] * 5
        for number, query in enumerate(queries):
            ids, scores = by_hand(store, query, 7, gone[number], rule.cosine)
            assert found.ids[number] == ids
            np.testing.assert_allclose(found.scores[number], scores, atol=1e-6)
            expected = store.embeddings(store.rows_of(ids)).astype(np.float32)
            np.testing.assert_array_equal(found.embeddings[number], expected)


def test_a_query_finds_the_same_alone_as_in_company() -> None:
    with filled(None) as store:
        retriever, queries = LocalRetriever(store), vectors_of(40, seed=2)
        together = retriever.search(queries, 5)
        for number, query in enumerate(queries):
            alone = retriever.search(query[None], 5)
            assert alone.ids[0] == together.ids[number]
            np.testing.assert_array_equal(alone.scores[0], together.scores[number])


def test_few_probes_find_most_and_cells_still_give_exactly_k() -> None:
    with filled(None, 600) as store:
        retriever, queries = LocalRetriever(store, CELLS, OFF), vectors_of(20, seed=3)
        found = retriever.search(queries, 10)
        assert found.shortfall.tolist() == [0] * 20
        shares = [
            len(set(ids) & set(by_hand(store, query, 10, set(), None)[0]))
            for ids, query in zip(found.ids, queries, strict=True)
        ]
        assert np.mean(shares) > 8
        assert retriever.search(queries[:1], 600).shortfall.tolist() == [0]


def test_a_shortfall_is_said_and_its_places_are_empty() -> None:
    with Store.create(None, TOY) as store:
        add(store, np.repeat(vectors_of(2), 4, axis=0))
        found = LocalRetriever(store, rule=COPIES).search(vectors_of(1, seed=1), 5)
        assert found.shortfall.tolist() == [3]
        assert found.ids[0][2:] == ["", "", ""]
        assert not found.embeddings[0, 2:].any()
        assert not found.scores[0, 2:].any()


def test_over_fetching_gets_past_any_number_of_copies() -> None:
    with Store.create(None, TOY) as store:
        near, far = np.zeros(DIM), np.zeros(DIM)
        near[0], far[0], far[1] = 1, 0.2, 1
        vectors = np.concatenate([np.repeat(near[None], 200, 0), far[None]]).astype(np.float32)
        add(store, vectors)
        found = LocalRetriever(store, rule=COPIES).search(near[None], 2)
        assert found.ids == [["image0", "image200"]]


def test_pictures_that_look_alike_are_copies_whatever_their_cosine() -> None:
    with Store.create(None, TOY) as store:
        vectors = np.eye(DIM, dtype=np.float32)
        add(store, vectors[:2], level=50)
        add(store, vectors[2:4], 2, level=90)
        found = LocalRetriever(store).search(np.array([[4, 3, 2, 1, *[0] * 12]], float), 2)
        assert found.ids == [["image0", "image2"]]


def test_copies_of_an_image_query_can_be_left_out() -> None:
    with filled(None) as store:
        query = store.embeddings(np.array([5])).astype(np.float32)
        retriever = LocalRetriever(store, rule=COPIES)
        assert retriever.search(query, 3).ids[0][0] == "image5"
        found = retriever.search(query, 3, drop_copies_of_query=True)
        assert found.scores.max() <= 0.9


@pytest.mark.parametrize("settings", [IndexConfig(), CELLS], ids=["exact", "cells"])
def test_additions_and_removals_count_in_the_next_search(settings: IndexConfig) -> None:
    with filled(None) as store:
        retriever, query = LocalRetriever(store, settings, OFF), vectors_of(1, seed=9)
        best = retriever.search(query, 1).ids[0][0]
        store.remove([best])
        assert retriever.search(query, 5).ids[0][0] != best
        add(store, query, 900)
        assert retriever.search(query, 1).ids == [["image900"]]
        store.remove(["image900"])
        assert "image900" not in retriever.search(query, 299).ids[0]


@pytest.mark.parametrize("settings", [IndexConfig(), CELLS], ids=["exact", "cells"])
def test_a_condition_holds_before_the_cut_to_k(settings: IndexConfig) -> None:
    with filled(None) as store:
        retriever = LocalRetriever(store, settings, OFF)
        found = retriever.search(vectors_of(2, seed=4), 4, where="source LIKE '7_.png'")
        assert found.shortfall.tolist() == [0, 0]
        assert {id_ for ids in found.ids for id_ in ids} <= {f"image7{n}" for n in range(10)}
        assert retriever.search(vectors_of(1), 4, where="source = '8.png'").shortfall.tolist() == [3]
        assert retriever.search(vectors_of(1), 4, where="source = 'none'").shortfall.tolist() == [4]


@pytest.mark.parametrize("k", [0, -1, 301])
def test_an_impossible_k_is_refused(k: int) -> None:
    text = f"k must be between 1 and 300, the number of images in the index in memory, got {k}: change k or add images"
    with filled(None) as store, pytest.raises(UsageError, match=text):
        LocalRetriever(store).search(vectors_of(1), k)


def test_bad_queries_are_refused() -> None:
    with filled(None) as store:
        retriever = LocalRetriever(store)
        with pytest.raises(
            FingerprintError, match="queries: expected vectors of 16 numbers, got 3: use the index's encoder"
        ):
            retriever.search(np.ones((1, 3)), 1)
        with pytest.raises(UsageError, match="queries: expected finite vectors other than zero, row 1 is zero"):
            retriever.search(np.stack([np.ones(DIM), np.zeros(DIM)]), 1)
        with pytest.raises(UsageError, match="exclude_ids needs one list for each of the 2 queries, got 1"):
            retriever.search(np.ones((2, DIM)), 1, exclude_ids=[["a"]])


def test_an_empty_index_says_so() -> None:
    with (
        Store.create(None, TOY) as store,
        pytest.raises(StoreError, match="holds no images: add some before searching"),
    ):
        LocalRetriever(store).search(np.ones((1, DIM)), 1)


def test_the_exact_engine_never_loads_faiss(tmp_path: Path) -> None:
    filled(tmp_path / "index").close()
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from knn_diffusion.retrieval.index import LocalRetriever; from knn_diffusion.retrieval.store import Store\n"
        f"LocalRetriever(Store.open(Path({str(tmp_path / 'index')!r}))).search(np.ones((1, {DIM})), 3)\n"
        "print('faiss' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == "False\n"


def test_the_cells_are_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with filled(tmp_path / "index") as store:
        first = LocalRetriever(store, CELLS, OFF).search(vectors_of(3, seed=1), 5)
    monkeypatch.setattr(cell_engine, "train_index", None)
    monkeypatch.setattr(cell_engine, "add_rows", None)
    with Store.open(tmp_path / "index") as store:
        again = LocalRetriever(store, CELLS, OFF).search(vectors_of(3, seed=1), 5)
    assert again.ids == first.ids


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "facts", "facts missing", "other store", "other shape"])
def test_damaged_or_stale_cells_are_built_again(tmp_path: Path, damage: str) -> None:
    with filled(tmp_path / "index") as store:
        before = LocalRetriever(store, CELLS, OFF).search(vectors_of(3, seed=1), 5)
        assert cache_problem(tmp_path / "index") is None
    facts = tmp_path / "index" / "cache" / "search.json"
    said = json.loads(facts.read_text())
    part = tmp_path / "index" / "cache" / f"search-{said['parts'][0]['sha256'][:16]}.faiss"
    whole = bytearray(part.read_bytes())
    if damage == "flip":
        whole[len(whole) // 2] ^= 255
        part.write_bytes(whole)
    elif damage == "cut":
        part.write_bytes(whole[:100])
    elif damage == "missing":
        part.unlink()
    elif damage == "facts":
        facts.write_text("{")
    elif damage == "facts missing":
        facts.unlink()
    elif damage == "other store":
        facts.write_text(json.dumps(said | {"parts": [said["parts"][0] | {"history": "0"}]}))
    else:
        facts.write_text(json.dumps(said | {"shape": said["shape"] | {"cells": 3}}))
    assert (cache_problem(tmp_path / "index") is None) == damage.startswith("other")
    with Store.open(tmp_path / "index") as store:
        after = LocalRetriever(store, CELLS, OFF).search(vectors_of(3, seed=1), 5)
    assert after.ids == before.ids
    assert cache_problem(tmp_path / "index") is None
    assert json.loads(facts.read_text()) == said
    assert len(list(facts.parent.iterdir())) == 4


def test_a_build_that_was_interrupted_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done > 200:
            raise StoppedError

    monkeypatch.setattr(cell_engine, "PART_ROWS", 50)
    monkeypatch.setattr(cell_engine, "KEPT_ROWS", 50)
    with filled(tmp_path / "whole") as store:
        expected = LocalRetriever(store, CELLS, OFF).search(vectors_of(3, seed=1), 5)
    with filled(tmp_path / "index") as store:
        with pytest.raises(StoppedError):
            LocalRetriever(store, CELLS, OFF).prepare(stop)
        added: list[int] = []
        monkeypatch.setattr(cell_engine, "train_index", None)
        LocalRetriever(store, CELLS, OFF).prepare(lambda what, done, total: added.append(done))
        assert added == [250, 300]
        assert LocalRetriever(store, CELLS, OFF).search(vectors_of(3, seed=1), 5).ids == expected.ids


def test_later_rows_go_into_cells_while_searches_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_engine, "TAIL_ROWS", 8)
    monkeypatch.setattr(cell_engine, "KEPT_ROWS", 60)
    everything = replace(CELLS, image=Reach(probes=8, depth=60))
    with filled(tmp_path / "index", 100) as store:
        retriever, query = LocalRetriever(store, everything, OFF), vectors_of(1, seed=3)
        retriever.prepare()
        engine = retriever._engine
        assert isinstance(engine, CellEngine)
        sizes = []
        for turn in range(12):
            add(store, vectors_of(10, seed=10 + turn), 500 + 10 * turn)
            found = retriever.search(query, 9)
            assert found.ids[0] == by_hand(store, query[0], 9, set(), None)[0]
            engine.settle()
            assert retriever.search(query, 9).ids == found.ids
            sizes.append([part.num_records for part in engine._parts])
        assert sizes[0] == [100, 110]
        assert sizes[-1][-1] == 220
        assert max(len(one) for one in sizes) <= 5
        assert retriever._engine is engine
        store.remove(["image505"])
        assert "image505" not in retriever.search(query, 218).ids[0]
    with Store.open(tmp_path / "index") as store:
        again = LocalRetriever(store, everything, OFF)
        again.prepare()
        assert isinstance(again._engine, CellEngine)
        assert again._engine.num_records in (160, 170, 180, 190, 200, 210, 220)
        assert again.search(query, 9).ids[0] == by_hand(store, query[0], 9, set(), None)[0]


def test_growing_past_the_limit_changes_the_engine() -> None:
    with filled(None, 40) as store:
        retriever = LocalRetriever(store, IndexConfig(exact_below=50, cells=4), OFF)
        retriever.search(vectors_of(1), 3)
        assert isinstance(retriever._engine, ExactEngine)
        add(store, vectors_of(20, seed=5), 500)
        assert retriever.search(vectors_of(20, seed=5)[:1], 1).ids == [["image500"]]
        assert isinstance(retriever._engine, CellEngine)


def test_texts_look_further_than_images() -> None:
    with filled(None, 600) as store:
        narrow = replace(CELLS, image=Reach(probes=1, depth=1), text=Reach(probes=8, depth=60))
        retriever, queries = LocalRetriever(store, narrow, OFF), vectors_of(20, seed=3)
        for modality, whole in (("image", False), ("text", True)):
            found = retriever.search(queries, 10, modality=modality)
            exact = [by_hand(store, query, 10, set(), None)[0] for query in queries]
            assert (found.ids == exact) == whole


@pytest.mark.parametrize("layout", ["sq8", "fast-scan", "fast-scan-small", "paper"])
def test_every_layout_finds_the_nearest_when_it_looks_everywhere(layout: str, tmp_path: Path) -> None:
    with filled(tmp_path / "index") as store:
        settings = IndexConfig(layout=layout, cells=4, image=Reach(probes=4, depth=30))
        retriever, queries = LocalRetriever(store, settings, OFF), vectors_of(5, seed=1)
        rows, scores = retriever.nearest(queries, 6)
        for number, query in enumerate(queries):
            expected = cosines(store, query)
            assert rows[number].tolist() == expected[0][:6].tolist()
            np.testing.assert_allclose(scores[number], expected[1][:6], atol=1e-6)


def test_a_condition_that_leaves_few_rows_compares_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = replace(CELLS, image=Reach(probes=1, depth=1))
    with filled(None) as store:
        query = vectors_of(1, seed=4)
        for few in (0, 40):
            monkeypatch.setattr("knn_diffusion.retrieval.index.FEW_ROWS", few)
            rows, _ = LocalRetriever(store, blind, OFF).nearest(query, 5, where="source LIKE '7_.png' OR id LIKE '%5'")
            allowed = [row for row in cosines(store, query[0])[0] if row % 10 == 5 or 70 <= row < 80]
            assert (rows[0].tolist() == allowed[:5]) == (few == 40)
            assert set(rows[0].tolist()) <= set(allowed)


def test_searches_from_many_threads_agree() -> None:
    with filled(None) as store:
        retriever, query = LocalRetriever(store, CELLS), vectors_of(1, seed=8)
        expected, wrong = retriever.search(query, 5).ids, []

        def work() -> None:
            for _ in range(10):
                if retriever.search(query, 5).ids != expected:
                    wrong.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_self_neighbors_equal_comparing_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knn_diffusion.retrieval.neighbors.QUERY_ROWS", 64)
    monkeypatch.setattr("knn_diffusion.retrieval.neighbors.ITEM_ROWS", 50)
    monkeypatch.setattr("knn_diffusion.retrieval.neighbors._MAX_VALUES", 2000)
    heard: list[tuple[str, int, int]] = []
    with filled(None) as store:
        store.remove(["image7", "image200"])
        table = self_neighbors(store, 4, COPIES, progress=lambda *told: heard.append(told))
        rows = store.snapshot().live_rows
        ids = [item.id for item in store.items(rows)]
        stored = store.embeddings(rows).astype(np.float64)
        stored /= np.linalg.norm(stored, axis=1, keepdims=True)
        assert table.shape == (298, 4)
        assert table.dtype == np.int32
        for place in range(0, 298, 13):
            copies = {ids[n] for n in np.flatnonzero(stored @ stored[place] > 0.9)} | {ids[place]}
            expected, _ = by_hand(store, stored[place], 4, copies, 0.9)
            assert [ids[n] for n in table[place]] == expected
        assert heard[-1] == ("finding neighbors", 298, 298)


def test_self_neighbors_by_cells_are_nearly_those_of_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    with filled(None, 3000) as store:
        store.remove([f"image{n}" for n in range(100, 160)])
        exact = self_neighbors(store, 4, COPIES)
        monkeypatch.setattr(neighbors, "EVERY_PAIR", 1000)
        table = self_neighbors(store, 4, COPIES)
        assert table.shape == (2940, 4)
        assert not (table == np.arange(2940)[:, None]).any()
        shares = [len(set(one) & set(other)) / 4 for one, other in zip(table, exact, strict=True)]
        assert np.mean(shares) > 0.98


def test_a_join_of_all_cells_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    with filled(None) as store:
        store.remove(["image7"])
        exact = self_neighbors(store, 250, COPIES)
        monkeypatch.setattr(neighbors, "EVERY_PAIR", 10)
        monkeypatch.setattr(cell_join, "JOINED_CELLS", 64)
        np.testing.assert_array_equal(self_neighbors(store, 250, COPIES), exact)


def test_an_interrupted_join_goes_on_with_the_next_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what == "finding neighbors" and done > 150:
            raise StoppedError

    monkeypatch.setattr(neighbors, "EVERY_PAIR", 10)
    monkeypatch.setattr(cell_join, "NOTED_EVERY", 1)
    monkeypatch.setattr(cell_join, "MEMORY_BYTES", 100)
    output, told = tmp_path / "neighbors.npy", []
    with filled(None) as store:
        expected = self_neighbors(store, 3, COPIES)
        with pytest.raises(StoppedError):
            self_neighbors(store, 3, COPIES, output=output, progress=stop)
        assert not output.exists()
        self_neighbors(store, 3, COPIES, output=output, progress=lambda *one: told.append(one))
        assert min(done for what, done, _ in told if what == "finding neighbors") > 150
        np.testing.assert_array_equal(np.load(output), expected)
        assert [path.name for path in tmp_path.iterdir()] == ["neighbors.npy"]
        with pytest.raises(StoppedError):
            self_neighbors(store, 3, COPIES, output=output, progress=stop)
        store.remove(["image0"])
        told.clear()
        self_neighbors(store, 3, COPIES, output=output, progress=lambda *one: told.append(one))
        assert min(done for what, done, _ in told if what == "finding neighbors") < 150
        assert len(np.load(output)) == 299


def test_self_neighbors_leave_out_pictures_that_look_like_the_image() -> None:
    with Store.create(None, TOY) as store:
        vectors = np.eye(DIM, dtype=np.float32) + 0.1
        add(store, vectors[:2], level=50)
        add(store, vectors[2:3], 2, level=90)
        assert self_neighbors(store, 2, DedupConfig()).tolist() == [[2, -1], [2, -1], [0, -1]]


def test_a_single_image_has_no_neighbors() -> None:
    with Store.create(None, TOY) as store:
        add(store, vectors_of(1))
        assert self_neighbors(store, 2, COPIES).tolist() == [[-1, -1]]
        with pytest.raises(UsageError, match="k must be at least 1, got 0"):
            self_neighbors(store, 0, COPIES)


def test_neighbors_of_the_stored_vectors_are_the_self_neighbors() -> None:
    with filled(None, 120) as store:
        stored = store.embeddings(np.arange(120)).astype(np.float32)
        stored /= np.linalg.norm(stored, axis=1, keepdims=True)
        own = np.arange(120)[:, None]
        np.testing.assert_array_equal(neighbors_of(store, stored, own, 3, COPIES), self_neighbors(store, 3, COPIES))
        elsewhere = neighbors_of(store, stored, np.zeros((120, 0), np.int64), 1, OFF)
        np.testing.assert_array_equal(elsewhere, own)


@pytest.mark.parametrize(("queries", "used"), [(1, 1), (cells.FEW_QUERIES, 1), (cells.FEW_QUERIES + 1, 3)])
def test_few_queries_are_searched_for_on_one_thread_and_the_setting_stays(queries: int, used: int) -> None:
    faiss, found = cells.faiss_module(), list[int]()

    def ask() -> None:
        faiss.omp_set_num_threads(3)
        with suppress(ValueError), cells.threads_for(queries):
            found.append(faiss.omp_get_max_threads())
            raise ValueError
        found.append(faiss.omp_get_max_threads())

    before = faiss.omp_get_max_threads()
    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    assert found == [used, 3]
    assert faiss.omp_get_max_threads() == before


def test_stored_numbers_are_widened_exactly() -> None:
    stored = np.random.default_rng(0).standard_normal((333, 257)).astype(np.float16)
    assert np.array_equal(widened(stored), stored.astype(np.float32))
    assert widened(stored[:0]).shape == (0, 257)


FULL_CELLS = """
import faulthandler, sys
import numpy as np
from knn_diffusion.retrieval.cells import add_rows, empty_like, list_sizes, merged, search_cells, train_index

faulthandler.enable()
vectors = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
trained = train_index(sys.argv[1], vectors, 1)
for held in (32, 63, 64, 96, 128, 256):
    for more in (1, 31, 32, 33, 100):
        first, second, whole = (empty_like(trained) for _ in range(3))
        add_rows(first, vectors[:held], np.arange(held))
        add_rows(second, vectors[held : held + more], 1000 + np.arange(more))
        add_rows(whole, vectors[: held + more], np.concatenate([np.arange(held), 1000 + np.arange(more)]))
        made = merged(first, second)
        assert (made.ntotal, list_sizes(made).tolist()) == (held + more, [held + more])
        for depth in (5, held + more):
            found, expected = (search_cells(one, vectors, depth, 1, None) for one in (made, whole))
            assert np.array_equal(found, expected), (held, more)
print("equal")
"""


@pytest.mark.parametrize("layout", ["fast-scan", "fast-scan-small", "sq8", "paper"])
def test_cells_of_any_number_of_rows_take_those_of_another_index(layout: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FULL_CELLS, layout], capture_output=True, text=True, timeout=120, check=False
    )  # on its own, since writing beyond its memory ends a process
    assert ran.stdout == "equal\n", ran.stderr
