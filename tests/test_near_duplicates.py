"""De-duplication of a whole index: greedy and first come first kept, exact or by cells, whatever the order of work."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from store_world import TOY
from test_image_index import ColourEncoder

from knn_diffusion.cli import main
from knn_diffusion.errors import ConfigError, UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.retrieval import cell_join, near_duplicates, neighbors
from knn_diffusion.retrieval.dedup import OFF, DedupConfig
from knn_diffusion.retrieval.near_duplicates import NearDuplicateRule, NearDuplicates, find_near_duplicates
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store


def add(store: Store, vectors: np.ndarray, levels: np.ndarray | None = None) -> None:
    first = store.snapshot().num_rows
    contents = [hashlib.sha256(str(first + n).encode()).hexdigest() for n in range(len(vectors))]
    thumbnails = None if levels is None else np.repeat(levels[:, None], 192, 1).astype(np.uint8)
    store.append(
        [Item(source=f"{n}.png", content=one, id=one[:16]) for n, one in enumerate(contents)], vectors, thumbnails
    )


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


def test_cells_find_nearly_all_planted_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    originals = random.standard_normal((1800, 24))
    copies = originals[:200] + 0.02 * random.standard_normal((200, 24))
    with store_of(np.concatenate([originals, copies])) as store:
        assert pairs(found(store)) == {1800 + number: number for number in range(200)}
        monkeypatch.setattr(neighbors, "EVERY_PAIR", 10)
        joined = found(store)
        assert not joined.exact
        assert len(joined.dropped) >= 196
        assert set(pairs(joined).items()) <= {(1800 + number, number) for number in range(200)}


def test_a_chain_of_copies_keeps_what_is_far_from_all_that_stay() -> None:
    with store_of(at_angles(0, 10, 20, 30, 40)) as store:
        assert pairs(found(store, threshold=float(np.cos(np.deg2rad(11))))) == {1: 0, 3: 2}


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_repeats_in_an_index_of_one_image_or_none(count: int) -> None:
    with store_of(at_angles(0, 10)[:count].reshape(count, 2)) if count else Store.create(None, TOY) as store:
        assert pairs(found(store)) == {}


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_an_impossible_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        NearDuplicateRule(threshold=threshold)


def test_the_rule_is_stricter_than_that_of_neighbor_lists() -> None:
    assert NearDuplicateRule.stricter_than(DedupConfig(cosine=0.98)).threshold == pytest.approx(0.99)
    assert NearDuplicateRule.stricter_than(DedupConfig(cosine=0.8)).threshold == 0.95
    assert NearDuplicateRule.stricter_than(OFF) == NearDuplicateRule(threshold=0.95, manhattan=2.0)


def sheet_of_copies(folder: Path) -> Path:
    """Four pictures, one of them three times with a grey level of difference."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(4):
        pixels = random.integers(0, 250, (16, 16, 3), np.uint8)
        for copy in range(3 if number == 1 else 1):
            Image.fromarray(pixels + np.uint8(copy)).save(folder / f"{number}-{copy}.png")
    return folder


def test_copies_are_reported_drawn_and_removed_when_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "index"
    with ImageIndex.build(sheet_of_copies(tmp_path / "photos"), place, ColourEncoder()) as index:
        stays = index.dedup(0.99)
        assert [Path(copy.source).name for copy in stays.copies] == ["1-1.png", "1-2.png"]
        assert {Path(copy.kept_source).name for copy in stays.copies} == {"1-0.png"}
        assert (stays.removed, len(index)) == (False, 6)
    command = ["index", "dedup", str(place), "--threshold", "0.99", "--json"]
    assert main([*command, "--report", str(tmp_path / "copies.jsonl"), "--picture", str(tmp_path / "copies.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["copies"], told["groups"], told["removed"]) == (6, 2, 1, False)
    lines = [json.loads(line) for line in (tmp_path / "copies.jsonl").read_text().splitlines()]
    assert [Path(line["source"]).name for line in lines] == ["1-1.png", "1-2.png"]
    with Image.open(tmp_path / "copies.png") as sheet:
        assert sheet.width > 3 * 96
    assert main([*command, "--apply"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] is True
    with ImageIndex.open(place, ColourEncoder()) as index:
        assert len(index) == 4
        assert not index.dedup(0.99).copies


def test_a_bundled_index_is_looked_at_but_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "dedup", "stickers", "--apply"]) == 1
    assert "read-only" in capsys.readouterr().err


def test_a_picture_needs_an_ending_that_says_its_format(tmp_path: Path) -> None:
    with ImageIndex.build(sheet_of_copies(tmp_path / "photos"), None, ColourEncoder()) as index:
        with pytest.raises(UsageError, match=r"copies\.xyz"):
            index.dedup(0.99).write_picture(tmp_path / "copies.xyz", index.preview)
        assert not (tmp_path / "copies.xyz").exists()
