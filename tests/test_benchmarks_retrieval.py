"""The figures of `benchmarks/retrieval.py` mean what their columns say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from retrieval import medians
from vector_search import data as data_module
from vector_search import measure, ours, report, worker
from vector_search.adding import new_vectors
from vector_search.clip_like import BLOCK_ROWS, EXPECTED, ClipLike, measured_cosines
from vector_search.data import Data, exact_nearest, from_files, synthetic
from vector_search.measure import recall
from vector_search.registry import SYSTEMS
from vector_search.scenarios import NEEDS, others
from vector_search.targets import Results, targets


@pytest.fixture(scope="module")
def world() -> ClipLike:
    return ClipLike(64, num_topics=60, num_subtopics=20, patch_rank=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return synthetic(tmp_path_factory.mktemp("cache"), 2_000, dim=16, num_queries=40)


# The vectors


def test_random_and_matched_cosines_are_those_of_the_recipe(world: ClipLike) -> None:
    texts, described = world.pairs(2_000, seed=3)
    found = measured_cosines(world.images(2_000, seed=1), texts, described)
    assert found.keys() == EXPECTED.keys()
    for name, cosine in found.items():
        assert cosine == pytest.approx(EXPECTED[name], abs=0.05), name


def test_cosines_of_random_pairs_leave_out_each_vector_with_itself() -> None:
    assert measured_cosines(np.eye(3), None) == {"image with random image": 0.0}


def test_the_first_vectors_do_not_depend_on_how_many_are_drawn(world: ClipLike) -> None:
    assert np.array_equal(world.images(100, seed=1), world.images(BLOCK_ROWS + 10, seed=1)[:100])
    assert not np.array_equal(world.images(100, seed=1), world.images(100, seed=2))


def test_one_row_in_twenty_is_a_near_copy(world: ClipLike) -> None:
    plain, planted = world.block(0, 1, copies=False), world.block(0, 1)
    changed = np.flatnonzero((plain != planted).any(1))
    assert len(changed) == int(0.05 * BLOCK_ROWS)
    nearest = (planted[changed[:200]] @ plain.T).max(1)
    assert nearest.min() > 0.92
    assert nearest.max() < 0.999


# Truth and recall


def test_recall_is_the_share_of_the_true_neighbors() -> None:
    truth = np.array([[1, 2], [3, 4]])
    assert recall(np.array([[2, 1], [4, 3]]), truth) == 1
    assert recall(np.array([[2, 7], [-1, -1]]), truth) == 0.25
    assert recall(np.array([[2], [4]]), truth) == 0.5


@pytest.mark.parametrize("kept", [None, 7])
def test_true_neighbors_in_blocks_are_those_of_one_product(
    data: Data, kept: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Data.blocks, "__defaults__", (300,))
    queries, vectors = data.queries["text"], np.array(data.vectors)
    allowed = None if kept is None else np.arange(len(vectors)) % kept == 0
    scores = queries @ vectors.T
    scores[:, np.zeros(len(vectors), bool) if allowed is None else ~allowed] = -np.inf
    assert np.array_equal(exact_nearest(data, queries, 5, allowed), np.argsort(-scores, axis=1)[:, :5])


def test_true_neighbors_are_kept_with_the_data(data: Data) -> None:
    again = Data(data.folder)
    for kind in ("image", "text"):
        assert np.array_equal(again.truth[kind], exact_nearest(again, again.queries[kind], data_module.K))


def test_a_data_set_that_was_broken_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(data_module, "exact_nearest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            synthetic(tmp_path, 1_000, dim=8, num_queries=20)
    assert synthetic(tmp_path, 1_000, dim=8, num_queries=20).truth["image"].shape == (20, data_module.K)


def test_queries_from_a_file_are_held_out_of_it(tmp_path: Path) -> None:
    given = np.random.default_rng(0).standard_normal((300, 8))
    np.save(tmp_path / "images.npy", given)
    found = from_files(tmp_path / "cache", 200, tmp_path / "images.npy", None, num_queries=50)
    assert found.size == 200
    assert found.queries.keys() == {"image"}
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1)
    assert (found.queries["image"] @ np.array(found.vectors).T).max() < 0.9999


def test_texts_of_another_width_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.ones((300, 8)))
    np.save(tmp_path / "texts.npy", np.ones((300, 9)))
    with pytest.raises(SystemExit, match=r"expected rows of 8 floats, as the images have, got \(300, 9\)"):
        from_files(tmp_path / "cache", 200, tmp_path / "images.npy", tmp_path / "texts.npy")


# Systems


@pytest.mark.parametrize(("name", "least"), [("exact", 1.0), ("fast-scan", 0.99), ("paper", 0.8)])
def test_a_system_that_looks_everywhere_finds_the_neighbors(
    data: Data, name: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MIN_SECONDS", 0.0)
    built = worker.build(name, data, tmp_path)
    rows = worker.measure(name, data, tmp_path)
    best = list(rows.values())[-1]  # as many probes as there are cells, or nearly
    assert best["image_recall"] >= least
    assert best["text_recall"] >= least
    assert 0 < built["index_bytes_without_fixed"] <= built["index_bytes"] <= built["disk_bytes"]
    assert best.keys() >= {"cpu_ms_single", "cpu_ms_batch", "p50_ms", "p99_ms", "queries_per_second", "own_bytes"}


def test_a_filter_on_one_source_keeps_one_row_in_a_hundred(data: Data) -> None:
    from knn_diffusion.retrieval.store import Store

    with Store.open(ours.shared_store(data)) as store:
        kept = store.matching("source = 'source-42'")
        assert np.array_equal(kept, np.arange(data.size) % 100 == 42)
        assert np.allclose(store.embeddings(np.arange(5)), data.vectors[:5], atol=1e-3)


def test_added_vectors_are_near_others_and_none_of_them(data: Data) -> None:
    added = new_vectors(data)
    assert len(added) == 400
    assert (added @ np.array(data.vectors).T).max(1) == pytest.approx(0.9, abs=0.06)


def test_a_row_is_no_neighbor_of_its_own() -> None:
    found = np.array([[5, *range(10, 20)], [*range(10, 20), 6]])
    assert others(found, np.array([5, 6])).tolist() == [list(range(10, 20))] * 2


def test_every_scenario_needs_systems_that_exist() -> None:
    assert {name for names in NEEDS.values() for name in names} <= SYSTEMS.keys()


# The report


def results(**changes: float) -> Results:
    """Everything met, but for the changes: names are system, key, joined by two underscores."""
    paper = {"index_bytes": 270.0, "index_bytes_without_fixed": 264.0, "own_bytes": 280.0, "p50_ms": 1.0, "cpu_ms_single": 1.0,
             "queries_per_second": 1_000.0, "image_recall": 0.94, "text_recall": 0.77}  # fmt: skip
    mapped = {"index_bytes": 140.0, "index_bytes_without_fixed": 136.0, "own_bytes": 150.0, "p50_ms": 0.4,
              "cpu_ms_single": 0.4, "queries_per_second": 7_000.0, "image_recall": 0.99, "text_recall": 0.83}  # fmt: skip
    rows: dict[str, dict[str, dict[str, float]]] = {
        "paper": {"20 probes": paper},
        "fast-scan": {"20 probes, 10K": mapped, "128 probes, 20K": mapped | {"p50_ms": 0.9, "text_recall": 0.96},
                      "256 probes, 20K": mapped | {"p50_ms": 1.2, "text_recall": 0.99}},
        "fast-scan-ram": {"20 probes, 10K": mapped | {"p50_ms": 0.3, "cpu_ms_single": 0.3},
                          "128 probes, 20K": mapped | {"p50_ms": 0.8, "text_recall": 0.96}},
        "fast-scan-cold": {"20 probes, 10K": {"p50_ms": 5.0, "p99_ms": 9.0, "disk_kib": 400.0}},
        "fast-scan-small": {"20 probes, 20K": mapped | {"index_bytes_without_fixed": 72.0}},
        "paper-long-lists": {"20 probes": {"cpu_ms_single": 10.0}},
        "fast-scan-long-lists": {"20 probes, 10K": {"cpu_ms_single": 0.6}},
    }  # fmt: skip
    adding = {"vectors_per_second": 20_000.0, "seconds_until_found": 0.1, "p99_ms_alone": 1.0, "p99_ms_beside": 1.5}
    scenarios = {
        "self-neighbors": {"table_rows_per_cpu_second": 9_000.0, "table_rows_per_cpu_second_with_cells": 7_000.0,
                           "table_recall": 0.994,
                           "paper_online_rows_per_cpu_second": 1_100.0, "ours_online_rows_per_cpu_second": 3_000.0},
        "adding": dict(adding),
        "adding-same-process": dict(adding),
        "cold-open": {"cold_seconds": 1.0},
        "filter": {"image_recall": 0.99, "text_recall": 0.96},
    }  # fmt: skip
    for name, value in changes.items():
        where, key = name.replace("_in_", "-").split("__")
        place = scenarios[where] if where in scenarios else next(iter(rows[where].values()))
        assert key in place, name
        place[key] = value
    return Results(1_000_000, rows, scenarios)


def test_every_target_can_be_met() -> None:
    assert [target.name for target in targets(results()) if not target.met] == []


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"fast_in_scan__index_bytes_without_fixed": 150.0}, "RAM a vector"),
        ({"fast_in_scan_in_small__index_bytes_without_fixed": 80.0}, "RAM a vector, small"),
        ({"fast_in_scan_in_ram__p50_ms": 0.34}, "latency at 20 probes, compared rows in RAM"),
        ({"fast_in_scan_in_ram__queries_per_second": 5_900.0}, "throughput of one thread at 20 probes, rows in RAM"),
        ({"fast_in_scan__p50_ms": 0.46}, "latency at 20 probes, rows mapped and warm"),
        ({"fast_in_scan__image_recall": 0.984}, "image recall@10 at 20 probes"),
        ({"fast_in_scan__text_recall": 0.76}, "text recall@10 at 20 probes"),
        ({"paper_in_long_in_lists__cpu_ms_single": 5.9}, "CPU a query with the paper's 3,050 codes a cell"),
        ({"self_in_neighbors__table_recall": 0.98}, "neighbors of every row against online search"),
        ({"self_in_neighbors__table_rows_per_cpu_second": 5_400.0}, "neighbors of every row against online search"),
        ({"adding__p99_ms_beside": 2.1}, "adding while serving, another process writes"),
        ({"adding__seconds_until_found": 1.1}, "adding while serving, another process writes"),
        ({"cold_in_open__cold_seconds": 2.1}, "opening cold"),
        ({"filter__text_recall": 0.94}, "filter that keeps 1 %, recall@10"),
    ],
)
def test_each_target_is_missed_by_its_own_figure(change: dict[str, float], missed: str) -> None:
    assert [target.name for target in targets(results(**change)) if target.met is False] == [missed]


@pytest.mark.parametrize(("system", "rows"), [("fast-scan", "mapped"), ("fast-scan-ram", "in RAM")])
def test_text_recall_in_no_more_time_counts_no_slower_setting(system: str, rows: str) -> None:
    found = results()
    slow: Any = found.rows[system]["128 probes, 20K"]
    slow["p50_ms"] = 1.1
    line = next(target for target in targets(found) if target.name == f"text recall@10 in no more time, rows {rows}")
    assert line.met is False
    assert line.measured.startswith("0.8300 at 20 probes")


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    lines = targets(Results(1_000, {}, {}))
    assert {line.met for line in lines} == {None}
    assert all(line.measured.startswith("not measured (") for line in lines)


def test_the_median_of_the_rounds_counts() -> None:
    rounds: Any = [{"a": {"x": value}} for value in (3.0, 1.0, 2.0)]
    assert medians(rounds) == {"a": {"x": 2.0}}


def test_the_report_has_every_target_row_and_omission() -> None:
    found = results()
    whole = {
        "machine": report.machine(),
        "data": {"size": 1_000_000, "dim": 512, "cosines": {"image with random image": 0.5}},
        "training": {"paper": {"cells": "k-means"}},
        "targets": [target.to_dict() for target in targets(found)],
        "rows": found.rows,
        "scenarios": found.scenarios,
        "left_out": {"usearch": "not installed: pip install usearch"},
    }
    text = report.to_markdown(json.loads(json.dumps(whole)))
    assert text.startswith("# Image index: 1,000,000 vectors of 512 numbers")
    assert all(f"| {target.name} | {target.target} | {target.measured} | met |" in text for target in targets(found))
    assert all(f"| {system} | {label} |" in text for system, rows in found.rows.items() for label in rows)
    assert "Left out: usearch (not installed: pip install usearch)." in text
