"""The plan says before the work starts how an index is searched and what that takes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from knn_diffusion.errors import ConfigError, UsageError
from knn_diffusion.retrieval.cells import _nearest_cells, add_rows, faiss_module, merged, search_cells, train_index
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.plan import CELL_LAYOUTS, IndexConfig, Layout, Reach, code_bytes, plan_for
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

PLENTY = 2**40


def unit_vectors(count: int, dim: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((10, dim))
    vectors = centres[random.integers(0, 10, count)] + random.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("count", "memory", "layout"),
    [(100_000, 1, "exact"), (100_001, PLENTY, "fast-scan"), (10**8, 12 * 2**30, "fast-scan-small")],
)
def test_the_layout_follows_size_and_memory(count: int, memory: int, layout: Layout) -> None:
    assert plan_for(count, 512, IndexConfig(memory_bytes=memory)).layout == layout


def test_too_little_memory_is_refused_with_what_it_takes() -> None:
    text = "expected memory for 1,000,000,000 images of 512 numbers, 67.3 GiB at least, got 1.0 GiB: allow more"
    with pytest.raises(UsageError, match=text):
        plan_for(10**9, 512, IndexConfig(memory_bytes=2**30))


def test_a_layout_asked_for_is_taken_at_any_size() -> None:
    plan = plan_for(50, 512, IndexConfig(layout="paper"))
    assert (plan.layout, plan.reason, plan.engine) == ("paper", "asked for", "paper, 32 cells")
    assert plan_for(10**9, 512, IndexConfig(layout="exact")).layout == "exact"


def test_a_plan_reads_as_one_line() -> None:
    told = str(plan_for(1_000_000, 512, IndexConfig(memory_bytes=PLENTY)))
    assert told.startswith(
        "1,000,000 images: search is fast-scan, 4,096 cells (1,000,000 images are more than 100,000, "
    )
    assert told.endswith("and it fits 1,024.0 GiB), 139 MiB of memory, 139 MiB of disk, about 2.2 minutes to build")
    assert str(plan_for(1000, 512, IndexConfig())).endswith("(1,000 images are at most 100,000), 2 MiB of memory")


def test_cells_grow_with_the_root_of_the_size() -> None:
    counts = (1, 40, 1_000_000, 400_000_000)
    assert [IndexConfig().num_cells(count) for count in counts] == [1, 32, 4096, 65_536]
    assert IndexConfig(cells=7).num_cells(5) == 5


@pytest.mark.parametrize("layout", CELL_LAYOUTS)
def test_the_memory_it_names_is_what_faiss_writes(layout: Layout) -> None:
    vectors = unit_vectors(4000, 64)
    index = train_index(layout, vectors, 16)
    empty = len(faiss_module().serialize_index(index))
    add_rows(index, vectors, np.arange(len(vectors)))
    each = (len(faiss_module().serialize_index(index)) - empty) / len(vectors)
    # Fast-scan lists are padded to 32 codes, which is 6 % of lists of 250.
    assert code_bytes(layout, 64) + 8 <= each <= 1.1 * (code_bytes(layout, 64) + 8)


def test_the_codes_take_the_bytes_the_layouts_promise() -> None:
    assert [code_bytes(layout, 512) for layout in CELL_LAYOUTS] == [128, 64, 256, 512]


@pytest.mark.parametrize("dim", [7, 12, 30])
@pytest.mark.parametrize("layout", CELL_LAYOUTS)
def test_odd_widths_and_few_vectors_can_be_searched(layout: Layout, dim: int) -> None:
    vectors = unit_vectors(20, dim)
    index = train_index(layout, vectors, 4)
    add_rows(index, vectors, np.arange(len(vectors)))
    assert set(search_cells(index, vectors[:1], 20, 4, None)[0].tolist()) == set(range(20))


def test_many_cells_are_found_by_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(3000, 32)
    flat = train_index("fast-scan", vectors, 64)
    monkeypatch.setattr("knn_diffusion.retrieval.cells.MANY_CELLS", 64)
    coded = train_index("fast-scan", vectors, 64)
    expected, found = (_nearest_cells(one, vectors[:200], 4)[1] for one in (flat, coded))
    hits = [len(set(one) & set(other)) / 4 for one, other in zip(expected, found, strict=True)]
    assert np.mean(hits) > 0.95


def test_merging_leaves_both_as_they_are() -> None:
    vectors = unit_vectors(300, 16)
    one, other = (train_index("fast-scan", vectors, 4) for _ in range(2))
    add_rows(one, vectors[:200], np.arange(200))
    add_rows(other, vectors[200:], np.arange(200, 300))
    both = merged(one, other)
    assert [index.ntotal for index in (one, other, both)] == [200, 100, 300]
    everything = search_cells(both, vectors[:1], 300, 4, None)[0]
    assert sorted(everything.tolist()) == list(range(300))


@pytest.mark.parametrize("wrong", [{"memory_bytes": 0}, {"cells": 0}, {"exact_below": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        IndexConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"probes": 0}, {"depth": 0}])
def test_an_impossible_reach_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Reach(**wrong)


def test_a_plan_counts_the_images_that_are_left() -> None:
    with Store.create(None, EncoderIdentity(name="toy", fingerprint="f" * 16, dim=8)) as store:
        contents = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(20)]
        store.append(
            [Item(source=str(n), content=one, id=str(n)) for n, one in enumerate(contents)], unit_vectors(20, 8)
        )
        store.remove(["3", "4"])
        plan = LocalRetriever(store).plan()
        assert (plan.count, plan.layout, plan.reason) == (18, "exact", "18 images are at most 100,000")
        assert plan.memory_bytes == 18 * 8 * 4
