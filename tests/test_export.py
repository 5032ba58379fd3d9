"""Embeddings for other tools: what goes out comes back bit for bit, and faiss finds the same neighbors in it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from embedding_files import DIM, MADE_BY, facts, filled, imported, stopping_after, vectors, write_clip_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from knn_diffusion.errors import KnnDiffusionError, StoreError, UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.retrieval.interchange import (
    export_vectors,
    faiss_file,
    find_vectors,
    import_vectors,
    reading,
    writing,
)
from knn_diffusion.retrieval.plan import IndexConfig, Reach
from knn_diffusion.retrieval.segments import stored_rows
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    return write_clip_folder(tmp_path / "clip")


# What goes out comes back


@pytest.mark.parametrize("layout", ["clip-retrieval", "npy"])
@pytest.mark.parametrize("source", ["photos/{}.png", "https://example.org/{}.png", ""])
def test_import_of_an_export_is_the_same_index(
    tmp_path: Path, layout: Any, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_ROWS", 11)
    monkeypatch.setattr(writing, "BATCH_ROWS", 4)
    monkeypatch.setattr(reading, "BATCH_ROWS", 9)
    store = filled(removed=(0, 7, 12, 29), source=source)
    report = export_vectors(store, tmp_path / "out", layout=layout)
    again, read = imported(tmp_path / "out")
    assert facts(again) == facts(store)
    assert (report.count, report.dim, report.files) == (26, DIM, 3 if layout == "clip-retrieval" else 1)
    assert (read.rows, read.added, read.already_present, read.num_skipped) == (26, 26, 0, 0)
    assert find_vectors(tmp_path / "out").encoder == MADE_BY
    assert again.problems() == []


@pytest.mark.parametrize("layout", ["clip-retrieval", "npy"])
def test_ids_and_sources_of_any_characters_come_back(tmp_path: Path, layout: Any) -> None:
    store = Store.create(None, MADE_BY)
    odd = [
        "ü 猫",
        "tab\there",
        "quote\"'",
        "return\rinside",
        "null\0byte",
        "\u2028line",
        " spaces ",
        "1.50",
        "nan",
        "None",
    ]
    items = [Item(id=word, source=word + "\n2", key=word, content=f"{n:064x}") for n, word in enumerate(odd)]
    store.append(items, vectors(len(odd)))
    export_vectors(store, tmp_path / "out", layout=layout)
    assert facts(imported(tmp_path / "out")[0]) == facts(store)


def test_an_id_with_a_line_break_goes_into_tables_only(tmp_path: Path) -> None:
    store = Store.create(None, MADE_BY)
    store.append([Item(id="a\nb", source="", content="0" * 64)], vectors(1))
    with pytest.raises(UsageError, match=r"expected ids of one line, got 'a\\nb': export as clip-retrieval"):
        export_vectors(store, tmp_path / "out", layout="npy")
    assert list(tmp_path.iterdir()) == []
    export_vectors(store, tmp_path / "out")
    assert facts(imported(tmp_path / "out")[0]) == facts(store)


@given(arrays.arrays(np.float32, (6, 3), elements=st.floats(-100, 100, width=32)))
@settings(max_examples=60, deadline=None)
def test_what_is_stored_does_not_change_when_it_is_stored_again(rows: np.ndarray) -> None:
    rows = rows[np.linalg.norm(rows.astype(np.float64), axis=1) > 0]
    once = stored_rows(rows, 3, "rows")
    assert np.array_equal(once, stored_rows(once, 3, "rows"))


def test_dividing_again_would_have_moved_bits() -> None:
    once = stored_rows(vectors(20_000, 3), 3, "rows")
    wide = once.astype(np.float64)
    twice = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
    assert not np.array_equal(once, twice)


def test_float16_vectors_of_another_length_are_still_made_units() -> None:
    long = (vectors(10) * 3).astype(np.float16)
    assert np.allclose(np.linalg.norm(stored_rows(long, DIM, "rows").astype(np.float32), axis=1), 1, atol=1e-3)


# Exports


def test_an_export_reads_as_clip_retrieval_expects_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    monkeypatch.setattr(writing, "SHARD_ROWS", 3)
    export_vectors(filled(source="https://example.org/{}.png"), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out" / "img_emb").glob("*"))
    assert names == [f"img_emb_{n}.npy" for n in range(10)]
    read = [np.load(tmp_path / "out" / "img_emb" / name) for name in names]
    assert (read[0].dtype, np.concatenate(read).shape) == (np.float16, (30, DIM))
    told = [parquet.read_table(path) for path in sorted((tmp_path / "out" / "metadata").glob("*.parquet"))]
    assert {tuple(table.column_names) for table in told} == {("id", "image_path", "url", "key", "content_sha256")}
    assert [url for table in told for url in table["url"].to_pylist()] == [
        f"https://example.org/{n}.png" for n in range(30)
    ]


def test_file_names_sort_as_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SHARD_ROWS", 2)
    export_vectors(filled(), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out" / "metadata").glob("*"))
    assert names == [f"metadata_{n:02}.parquet" for n in range(15)]


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in ("clip-retrieval", "npy"):
        for number in (1, 2):
            monkeypatch.setattr(writing, "BATCH_ROWS", 8)
            with pytest.raises(KeyboardInterrupt):
                export_vectors(filled(), tmp_path / "out", layout=layout, progress=stopping_after(number))  # type: ignore[arg-type]
            assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(KnnDiffusionError, match="the disk is full"):
        export_vectors(filled(), tmp_path / "out", layout="npy")
    assert list(tmp_path.iterdir()) == []


def test_an_index_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("Error in write: 28 != 100\nNo space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(KnnDiffusionError, match=r"image\.index could not be written \(.*No space left on device\)"):
        export_vectors(filled(), tmp_path / "out", faiss=IndexConfig())
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_compacted_meanwhile_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled().copy_to(made := tmp_path / "index")
    monkeypatch.setattr(writing, "BATCH_ROWS", 8)
    with Store.open(made) as store:

        def compacting(what: str, done: int, total: int) -> None:
            if done == 8:
                store.remove([store.items(store.snapshot().live_rows[-1:])[0].id])
                store.compact()

        with pytest.raises(StoreError, match="was compacted during the export, nothing was written"):
            export_vectors(store, tmp_path / "out", layout="npy", progress=compacting)
        assert not (tmp_path / "out").exists()
        export_vectors(store, tmp_path / "out", layout="npy")


def test_an_export_wants_a_new_folder_a_known_layout_and_images(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UsageError, match=r"out exists: choose another"):
        export_vectors(filled(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(StoreError, match="holds no images"):
        export_vectors(Store.create(None, MADE_BY), tmp_path / "new")


def test_no_file_is_ever_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_VALUES", 100 * 2048)
    monkeypatch.setattr(writing, "BATCH_ROWS", 100)
    np.save(tmp_path / "a.npy", vectors(2000, 2048))  # 16 MB
    identity = EncoderIdentity(name="toy", fingerprint="f", dim=2048)
    with Store.create(tmp_path / "index", identity) as store:
        tracemalloc.start()
        import_vectors(store, find_vectors(tmp_path / "a.npy"))
        export_vectors(store, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy", mmap_mode="r")) == 2000
    assert peak < 9e6  # a batch in float64 is 1.6 MB


# faiss


def best(index: Any, queries: np.ndarray, k: int) -> list[list[int]]:
    return [list(row) for row in index.search(queries, k)[1]]


def test_an_exact_faiss_index_finds_what_the_index_finds(tmp_path: Path) -> None:
    store = filled(removed=(0, 5, 20))
    report = export_vectors(store, tmp_path / "out", layout="npy", faiss=IndexConfig())
    index: Any = faiss.read_index(str(tmp_path / "out" / "image.index"))
    ids = (tmp_path / "out" / "ids.txt").read_text().splitlines()
    queries = vectors(10, seed=3)
    with ImageIndex(store) as opened:
        expected = opened.search(queries, 5, deduplicate=False).ids
    assert [[ids[place] for place in row] for row in best(index, queries, 5)] == expected
    assert (report.faiss, type(index).__name__, index.ntotal) == ("Flat", "IndexFlatIP", 27)
    told = json.loads((tmp_path / "out" / "image.json").read_text())
    assert (told["index_key"], told["nb vectors"], told["vectors dimension"]) == ("Flat", 27, DIM)


LAYOUTS = {"fast-scan": "OPQ4,IVF8,PQ4x4fs", "paper": "OPQ4,IVF8,PQ4x8", "sq8": "IVF8,SQ8"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("removed", [(), (0, 1, 250, 599, 605)])
def test_the_derived_faiss_index_numbers_images_as_the_files_do(
    tmp_path: Path, layout: Any, removed: tuple[int, ...]
) -> None:
    config = IndexConfig(layout=layout, cells=8, text=Reach(probes=8))
    store = Store.create(None, MADE_BY)
    items = [Item(id=f"id {n}", source="", content=f"{n:064x}") for n in range(610)]
    store.append(items[:600], vectors(610)[:600])
    store.append(items[600:], vectors(610)[600:])
    store.remove([f"id {n}" for n in removed])
    report = export_vectors(store, tmp_path / "out", layout="npy", faiss=config)
    index: Any = faiss.read_index(str(tmp_path / "out" / "image.index"))
    rows = np.load(tmp_path / "out" / "embeddings.npy").astype(np.float32)
    assert (report.faiss, index.ntotal) == (LAYOUTS[layout], len(rows) == 610 - len(removed) and len(rows))
    assert faiss.extract_index_ivf(index).nprobe == 8
    near = best(index, rows, 40)
    assert max(max(row) for row in near) < len(rows)
    assert np.mean([place in row for place, row in enumerate(near)]) > 0.97  # every vector finds itself


def test_rows_that_are_added_after_the_cells_were_made_are_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(tmp_path / "store", MADE_BY)
    config = IndexConfig(layout="sq8", cells=4, text=Reach(probes=4))
    items = [Item(id=f"id {n}", source="", content=f"{n:064x}") for n in range(350)]
    store.append(items[:300], vectors(350)[:300])
    faiss_file.faiss_index(store, store.snapshot(), config)  # leaves its cells in the cache
    store.append(items[300:], vectors(350)[300:])
    store.remove(["id 3", "id 310"])

    def no_training(*_: object) -> None:
        raise AssertionError("the cached cells should have been used")

    monkeypatch.setattr("knn_diffusion.retrieval.cell_engine._train", no_training)
    index, _ = faiss_file.faiss_index(store, store.snapshot(), config)
    rows = store.embeddings(store.snapshot().live_rows).astype(np.float32)
    assert index.ntotal == 348
    assert np.mean([place == row[0] for place, row in enumerate(best(index, rows, 1))]) > 0.97
    store.close()


def test_rows_that_came_during_the_export_are_not_in_the_file() -> None:
    store = filled(300)
    snapshot = store.snapshot()
    store.append([Item(id="late", source="", content="f" * 64)], vectors(1, seed=5))
    index, _ = faiss_file.faiss_index(store, snapshot, IndexConfig(layout="sq8", cells=4))
    assert index.ntotal == 300
    assert max(max(row) for row in best(index, vectors(300), 5)) == 299
