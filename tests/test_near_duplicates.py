"""De-duplication of a whole index: greedy, the first one stays, by every pair or by cells, whatever the order of work."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_diffusion.errors import ConfigError, StoreError, UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.retrieval import cell_join, near_duplicates, neighbors
from knn_diffusion.retrieval.dedup import OFF, DedupConfig
from knn_diffusion.retrieval.near_duplicates import NearDuplicateRule, NearDuplicates, find_near_duplicates
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

TOY = EncoderIdentity(name="toy", fingerprint="f" * 16, dim=2)


def add(store: Store, vectors: np.ndarray, levels: np.ndarray | None = None) -> None:
    first = store.snapshot().num_rows
    contents = [hashlib.sha256(str(first + n).encode()).hexdigest() for n in range(len(vectors))]
    thumbnails = None if levels is None else np.repeat(levels[:, None], 192, 1).astype(np.uint8)
    items = [Item(source=f"{first + n}.png", content=one, id=str(first + n)) for n, one in enumerate(contents)]
    store.append(items, vectors, thumbnails)


def store_of(vectors: np.ndarray, levels: np.ndarray | None = None) -> Store:
    store = Store.create(None, EncoderIdentity(name="toy", fingerprint="f" * 16, dim=vectors.shape[1]))
    add(store, vectors, levels)
    return store


def found(store: Store, threshold: float = 0.95, manhattan: float = 2.0) -> NearDuplicates:
    rule = NearDuplicateRule(threshold=threshold, manhattan=manhattan)
    return find_near_duplicates(store, store.snapshot(), rule)


def pairs(result: NearDuplicates) -> dict[int, int]:
    return dict(zip(result.dropped.tolist(), result.kept.tolist(), strict=True))


def at_angles(*degrees: float) -> np.ndarray:
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1)


def clumps(count: int, dim: int, seed: int, spread: float = 0.1) -> np.ndarray:
    """A few directions with many images near each, so that likeness chains."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((max(count // 8, 1), dim))
    return centres[random.integers(0, len(centres), count)] + spread * random.standard_normal((count, dim))


def likeness(store: Store, snapshot: Snapshot, threshold: float, manhattan: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all live images in float64, and which are the same picture; the slow and obvious way."""
    vectors = store.embeddings(snapshot.live_rows, snapshot).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pictures, known = store.thumbnails(snapshot.live_rows, snapshot)
    cosines = vectors @ vectors.T
    distance = np.abs(pictures[:, None].astype(int) - pictures[None]).mean(-1)
    return cosines, (cosines >= threshold) & ((distance <= manhattan) | ~(known[:, None] & known[None]))


def slow_greedy(cosines: np.ndarray, same: np.ndarray) -> dict[int, int]:
    kept: list[int] = []
    gone: dict[int, int] = {}
    for one in range(len(cosines)):
        repeated = [two for two in kept if same[one, two]]
        if repeated:
            gone[one] = max(repeated, key=lambda two: (cosines[one, two], -two))
        else:
            kept.append(one)
    return gone


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.7, 0.9, 0.97]), st.sampled_from([1.0, 255.0]))
def test_it_equals_the_obvious_greedy_rule(seed: int, count: int, threshold: float, manhattan: float) -> None:
    random = np.random.default_rng(seed)
    with store_of(clumps(count, 3, seed, 0.3), random.integers(0, 4, count)) as store:
        add(store, clumps(20, 3, seed + 1, 0.3))
        store.remove([store.items(np.array([count // 2]))[0].id])
        snapshot = store.snapshot()
        cosines, same = likeness(store, snapshot, threshold, manhattan)
        rows = snapshot.live_rows.tolist()
        expected = {rows[one]: rows[two] for one, two in slow_greedy(cosines, same).items()}
        result = found(store, threshold, manhattan)
        assert pairs(result) == expected
        stays = np.isin(snapshot.live_rows, result.dropped, invert=True)
        assert not (same & ~np.eye(len(same), dtype=bool))[np.ix_(stays, stays)].any()
        assert (result.cosines >= threshold).all()
        for name, size in (("QUERY_ROWS", 7), ("ITEM_ROWS", 5), ("PAIRS", 3)):
            with pytest.MonkeyPatch.context() as small:
                small.setattr(near_duplicates, name, size)
                again = found(store, threshold, manhattan)
                np.testing.assert_array_equal(again.kept, result.kept)
                np.testing.assert_array_equal(again.cosines, result.cosines)


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.25])
def test_a_join_of_all_cells_is_exact_whatever_order_they_come_in(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_of(clumps(1500, 6, 0, spread)) as store:
        store.remove([one.id for one in store.items(np.arange(100, 160))])
        exact = found(store)
        monkeypatch.setattr(neighbors, "EVERY_PAIR", 10)
        monkeypatch.setattr(cell_join, "JOINED_CELLS", 10**6)
        monkeypatch.setattr(near_duplicates, "QUERY_ROWS", 9)
        joined = found(store)
        assert 100 < len(exact.dropped) < 1400
        assert (exact.exact, joined.exact) == (True, False)
        for name in ("dropped", "kept", "cosines"):
            np.testing.assert_array_equal(getattr(joined, name), getattr(exact, name))


def planted(count: int) -> tuple[np.ndarray, int]:
    """Images that lie apart, and behind them a near-copy (cosine about .97) of every twentieth."""
    random = np.random.default_rng(0)
    many = clumps(count, 32, 0, 0.6)
    many /= np.linalg.norm(many, axis=1, keepdims=True)
    copies = many[::20] + 0.25 / np.sqrt(32) * random.standard_normal((len(many[::20]), 32))
    return np.concatenate([many, copies]), count


def test_joined_cells_find_planted_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, originals = planted(4000)
    with store_of(vectors) as store:
        exact = pairs(found(store, 0.93))
        monkeypatch.setattr(neighbors, "EVERY_PAIR", 1000)
        monkeypatch.setattr(cell_join, "JOINED_CELLS", 8)
        joined = pairs(found(store, 0.93))
    assert sum(row >= originals for row in exact) > 180
    assert len(exact.items() & joined.items()) > 0.97 * len(exact)
    assert len(joined.keys() - exact.keys()) < 0.01 * len(exact)


def test_a_cell_is_joined_with_itself_first_even_when_its_centroid_is_another_cells_too() -> None:
    centroids = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    centroids[20:] = centroids[:20]
    joined = cell_join.joined_cells(centroids)
    assert joined[:, 0].tolist() == list(range(40))
    assert joined[:20, 1].tolist() == list(range(20, 40))
    assert {len(set(cells)) for cells in joined.tolist()} == {cell_join.JOINED_CELLS}
    assert cell_join.joined_cells(centroids[:3]).shape == (3, 3)


def test_likeness_does_not_chain() -> None:
    with store_of(at_angles(0, 10, 20, 30)) as store:
        assert pairs(found(store, float(np.cos(np.deg2rad(12))))) == {1: 0, 3: 2}


def test_a_copy_goes_with_the_nearest_of_those_that_stay() -> None:
    with store_of(at_angles(0, 30, 18)) as store:
        assert pairs(found(store, 0.9)) == {2: 1}


@pytest.mark.parametrize("every_pair", [1000, 0])
def test_of_equally_near_ones_the_earliest_stays_for_a_copy(every_pair: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "EVERY_PAIR", every_pair)
    monkeypatch.setattr(cell_join, "JOINED_CELLS", 10**6)
    monkeypatch.setattr(near_duplicates, "ITEM_ROWS", 7)
    lattice = np.stack(np.meshgrid(*[[-2.0, -1.0, 1.0, 2.0]] * 4), -1).reshape(-1, 4)
    with store_of(np.random.default_rng(0).permutation(lattice)) as store:
        cosines, same = likeness(store, store.snapshot(), 0.75, 2.0)
        assert pairs(found(store, 0.75)) == slow_greedy(np.round(cosines, 9), same)


def test_an_image_that_only_later_ones_repeat_stays() -> None:
    with store_of(at_angles(40, 0, 5)) as store:
        assert pairs(found(store)) == {2: 1}


def test_pictures_must_confirm_what_embeddings_say() -> None:
    levels = np.array([100, 101, 110, 101])
    with store_of(at_angles(0, 1, 2, 90), levels) as store:
        assert pairs(found(store)) == {1: 0}
        assert pairs(found(store, manhattan=255.0)) == {1: 0, 2: 0}


def test_where_a_picture_is_missing_the_embeddings_decide() -> None:
    with store_of(at_angles(0, 90), np.array([0, 9])) as store:
        add(store, at_angles(1, 91))
        assert pairs(found(store)) == {2: 0, 3: 1}


def test_threshold_1_finds_equal_vectors_and_nothing_else() -> None:
    vectors = clumps(40, 48, 0)
    with store_of(np.concatenate([vectors, vectors])) as store:
        result = found(store, 1.0)
        assert pairs(result) == {40 + n: n for n in range(40)}
        assert (result.cosines == 1).all()


def test_removed_images_neither_go_nor_stay_for_others() -> None:
    with store_of(at_angles(0, 1, 2, 3)) as store:
        store.remove(["0", "2"])
        assert pairs(found(store)) == {3: 1}


@pytest.mark.parametrize("count", [0, 1])
def test_no_two_images_no_copies(count: int) -> None:
    with Store.create(None, TOY) as store:
        if count:
            add(store, at_angles(7))
        assert pairs(found(store)) == {}


def test_damage_is_noticed(tmp_path: Path) -> None:
    with Store.create(tmp_path / "index", TOY) as store:
        add(store, at_angles(0, 1))
    path = next((tmp_path / "index").rglob("*.embeddings.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with Store.open(tmp_path / "index") as store, pytest.raises(StoreError, match="is damaged"):
        found(store)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.0001, float("nan")])
def test_impossible_thresholds_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold must be in \(0, 1\], got "):
        NearDuplicateRule(threshold=value)


@pytest.mark.parametrize("value", [-1.0, 256.0, float("nan")])
def test_impossible_differences_of_pictures_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="manhattan must be in 0 … 255, got "):
        NearDuplicateRule(manhattan=value)


@pytest.mark.parametrize(
    ("lists", "threshold", "manhattan"),
    [(DedupConfig(), 0.95, 2.0), (DedupConfig(cosine=0.98, manhattan=1.0), 0.99, 1.0), (OFF, 0.95, 2.0)],
)
def test_what_is_deleted_is_nearer_than_what_lists_leave_out(
    lists: DedupConfig, threshold: float, manhattan: float
) -> None:
    rule = NearDuplicateRule.stricter_than(lists)
    assert (rule.threshold, rule.manhattan) == (pytest.approx(threshold), manhattan)
    assert NearDuplicateRule.stricter_than(DedupConfig(cosine=0.5)).threshold == 0.95


def test_nothing_goes_before_it_is_asked_for_and_then_all_at_once() -> None:
    with ImageIndex(store_of(at_angles(0, 1, 2, 90, 91, 45))) as index:
        report = index.dedup()
        assert (report.count, report.num_copies, report.num_groups, len(index)) == (6, 3, 2, 6)
        report.remove()
        assert index.ids == ["0", "3", "5"]
        assert index.dedup().num_copies == 0


def test_groups_come_largest_first_with_some_of_their_copies() -> None:
    with ImageIndex(store_of(at_angles(90, 0, 91, 1, 2, 3))) as index:
        first, second = index.dedup(threshold=0.9).groups(copies=2)
        assert (first.kept, first.source, first.size, len(first.copies)) == ("1", "1.png", 3, 2)
        assert [copy.id for copy in second.copies] == ["2"]
        assert second.copies[0].cosine == pytest.approx(np.cos(np.deg2rad(1)), abs=1e-3)
        assert len(index.dedup().groups(1)) == 1


def test_a_copy_is_not_removed_when_the_one_that_stays_for_it_is_gone() -> None:
    with ImageIndex(store_of(at_angles(0, 1, 90, 91))) as index:
        report = index.dedup()
        index.remove(["2"])
        with pytest.raises(UsageError, match="got '2' .* nothing was removed"):
            report.remove()
        assert index.ids == ["0", "1", "3"]


def test_a_report_of_images_that_left_the_disk_meanwhile_says_so(tmp_path: Path) -> None:
    with ImageIndex(store_of(at_angles(0, 1, 90, 91))) as index:
        report = index.dedup()
        index.remove(["1"])
        index.compact()
        for act in (
            report.remove,
            report.groups,
            lambda: list(report.copies()),
            lambda: report.write(tmp_path / "x.csv"),
        ):
            with pytest.raises(StoreError, match="lost images since its copies were looked for .*: look again"):
                act()
        assert index.ids == ["0", "2", "3"]
        assert not list(tmp_path.iterdir())


def test_a_read_only_index_is_looked_at_but_not_changed(tmp_path: Path) -> None:
    with Store.create(tmp_path / "index", TOY) as store:
        add(store, at_angles(0, 1))
    with ImageIndex.open(tmp_path / "index", read_only=True) as index:
        report = index.dedup()
        assert report.num_copies == 1
        with pytest.raises(StoreError, match="index is read-only: save a copy of it"):
            report.remove()
        assert len(index) == 2


def test_tables_hold_every_copy(tmp_path: Path) -> None:
    with ImageIndex(store_of(at_angles(0, 1, 90, 91))) as index:
        report = index.dedup()
        report.write(tmp_path / "copies.jsonl")
        report.write(tmp_path / "copies.csv")
        with pytest.raises(UsageError, match=r"expected a .csv or .jsonl file for the table of copies, got .*x.txt"):
            report.write(tmp_path / "x.txt")
    lines = [json.loads(line) for line in (tmp_path / "copies.jsonl").read_text().splitlines()]
    assert [(one["id"], one["kept"], one["source"], one["kept_source"]) for one in lines] == [
        ("1", "0", "1.png", "0.png"),
        ("3", "2", "3.png", "2.png"),
    ]
    with (tmp_path / "copies.csv").open(newline="") as file:
        assert [{**one, "cosine": float(one["cosine"])} for one in csv.DictReader(file)] == lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copies.csv", "copies.jsonl"]
