"""Neighbor lists without copies, paper A.4: greedy, by cosine and by Manhattan distance of 8×8 pictures."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_diffusion.errors import ConfigError
from knn_diffusion.retrieval.dedup import OFF, DedupConfig, calibrate, duplicates, first_different
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

NO_PICTURE = -1


def units(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=-1, keepdims=True)).float()


def at_angles(*degrees: float) -> torch.Tensor:
    radians = np.deg2rad(degrees)
    return units(np.stack([np.cos(radians), np.sin(radians)], 1))


def blank(count: int, level: int = NO_PICTURE) -> torch.Tensor:
    return torch.full((count, 192), level, dtype=torch.int16)


def chosen(vectors: torch.Tensor, pictures: torch.Tensor, k: int, rule: DedupConfig) -> list[int]:
    valid = torch.ones(1, len(vectors), dtype=torch.bool)
    return first_different(vectors[None], pictures[None], valid, k, rule)[0].tolist()


def test_a_copy_of_one_that_stays_is_dropped_and_the_next_takes_its_place() -> None:
    rule = DedupConfig(cosine=0.9, manhattan=None)
    assert chosen(at_angles(0, 5, 60, 62, 120), blank(5), 3, rule) == [0, 2, 4]


def test_what_is_missing_is_marked() -> None:
    assert chosen(at_angles(0, 1, 2), blank(3), 3, DedupConfig(cosine=0.9, manhattan=None)) == [0, -1, -1]


def test_likeness_does_not_chain() -> None:
    rule = DedupConfig(cosine=float(np.cos(np.deg2rad(12))), manhattan=None)
    assert chosen(at_angles(0, 10, 20, 30), blank(4), 4, rule) == [0, 2, -1, -1]


def test_pictures_alone_can_show_a_copy() -> None:
    pictures = torch.cat([blank(1, 100), blank(1, 102), blank(1, 140), blank(1)])
    assert chosen(at_angles(0, 40, 80, 120), pictures, 4, DedupConfig(cosine=0.9, manhattan=3.0)) == [0, 2, 3, -1]


def test_a_picture_that_is_not_known_is_never_a_copy_by_its_picture() -> None:
    assert chosen(at_angles(0, 40), blank(2), 2, DedupConfig(cosine=None, manhattan=255.0)) == [0, 1]


def test_without_rules_everything_stays() -> None:
    assert chosen(at_angles(0, 0, 0), blank(3, 7), 2, OFF) == [0, 1]


def test_the_query_is_held_against_the_candidates() -> None:
    query, many = at_angles(0), at_angles(3, 40)
    pictures = torch.stack([torch.cat([blank(1, 9), blank(1, 200)])])
    cosine = duplicates(query, blank(1), many[None], pictures, DedupConfig(cosine=0.9, manhattan=5.0))
    both = duplicates(query, blank(1, 198), many[None], pictures, DedupConfig(cosine=0.9, manhattan=5.0))
    assert cosine.tolist() == [[True, False]]
    assert both.tolist() == [[True, True]]


def slow_greedy(vectors: np.ndarray, pictures: np.ndarray, valid: np.ndarray, k: int, rule: DedupConfig) -> list[int]:
    kept: list[int] = []
    for one in np.flatnonzero(valid):
        near = rule.cosine is not None and any(vectors[one] @ vectors[two] > rule.cosine for two in kept)
        alike = rule.manhattan is not None and any(
            np.abs(pictures[one] - pictures[two]).mean() <= rule.manhattan for two in kept
        )
        if not near and not alike and len(kept) < k:
            kept.append(int(one))
    return kept + [-1] * (k - len(kept))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 4, 6, 40]),
    st.sampled_from([4, 14, 70]),
    st.sampled_from([None, 0.3, 0.8]),
    st.sampled_from([None, 30.0]),
)
def test_it_equals_the_obvious_greedy_rule(
    seed: int, k: int, count: int, cosine: float | None, manhattan: float | None
) -> None:
    random = np.random.default_rng(seed)
    vectors = units(random.standard_normal((3, count, 4)))
    pictures = torch.from_numpy(np.repeat(random.integers(0, 256, (3, count, 1)), 192, 2).astype(np.int16))
    valid = torch.from_numpy(random.random((3, count)) < 0.8)
    rule = DedupConfig(cosine=cosine, manhattan=manhattan)
    expected = [
        slow_greedy(vectors[n].numpy(), pictures[n].numpy().astype(int), valid[n].numpy(), k, rule) for n in range(3)
    ]
    assert first_different(vectors, pictures, valid, k, rule).tolist() == expected


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("cosine", 0.0, r"cosine must be in \(0, 1\] or None, got 0.0"),
        ("manhattan", 300.0, r"manhattan must be in 0 … 255 or None, got 300.0"),
    ],
)
def test_impossible_thresholds_are_refused(field: str, value: float, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        DedupConfig(**{field: value})


def store_of(vectors: np.ndarray, levels: np.ndarray | None) -> Store:
    store = Store.create(None, EncoderIdentity(name="toy", fingerprint="f", dim=vectors.shape[1]))
    items = [Item(source="", content=hashlib.sha256(str(n).encode()).hexdigest()) for n in range(len(vectors))]
    thumbnails = None if levels is None else np.repeat(levels[:, None], 192, 1).astype(np.uint8)
    store.append(items, vectors, thumbnails)
    return store


def test_calibration_keeps_visibly_different_neighbors_and_drops_copies() -> None:
    random = np.random.default_rng(0)
    centre = np.ones(16) / 4
    different = units(centre + 0.1 * units(random.standard_normal((100, 16))).numpy()).numpy()  # all above cosine 0.98
    copies = different + 1e-3 * random.standard_normal((100, 16))
    levels = np.concatenate([np.arange(100), np.arange(100)]) * 2
    with store_of(np.concatenate([different, copies]), 10 + levels) as store:
        rule = calibrate(store)
    assert rule is not None
    cosines = different @ different.T - np.eye(100)
    lost = (cosines.max(1) > (rule.cosine or 0)).mean()
    assert lost <= 0.05
    assert rule.cosine is not None
    assert 0.98 < rule.cosine < 0.9999


def test_calibration_never_goes_below_the_papers_threshold() -> None:
    with store_of(np.random.default_rng(0).standard_normal((50, 32)), np.arange(50) * 4) as store:
        assert calibrate(store) == DedupConfig(cosine=0.9)


@pytest.mark.parametrize(("count", "levels"), [(1, np.array([9])), (40, None), (40, np.full(40, 9))])
def test_where_no_two_pictures_differ_there_is_nothing_to_calibrate_on(count: int, levels: np.ndarray | None) -> None:
    with store_of(np.random.default_rng(0).standard_normal((count, 8)), levels) as store:
        assert calibrate(store) is None


def test_vectors_without_pictures_have_no_say_in_a_calibration() -> None:
    random = np.random.default_rng(0)
    vectors = units(random.standard_normal((60, 32))).numpy()
    with store_of(vectors, np.arange(60) * 4) as store:
        items = [Item(source="", content=hashlib.sha256(f"copy {n}".encode()).hexdigest()) for n in range(60)]
        store.append(items, vectors + 1e-3 * random.standard_normal((60, 32)), None)
        assert calibrate(store) == DedupConfig(cosine=0.9)
