"""Which neighbors training shows of an image, and what it does to their tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from knn_diffusion.errors import ConfigError
from knn_diffusion.training.conditioning import (
    ABSENT,
    ConditioningConfig,
    leaders,
    left_in,
    most_alike,
    moved,
    swapped,
)
from knn_diffusion.training.neighbors import DenoiserData

PLAIN = ConditioningConfig(k=3)
MANY = np.tile(np.arange(6), (4000, 1))
SIDE, CODES = 4, 9


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_dropping_the_k_nearest_are_shown_in_their_order() -> None:
    lists = np.array([[4, 2, 7, 1], [5, ABSENT, ABSENT, ABSENT]])
    assert left_in(lists, PLAIN, seeded()).tolist() == [[4, 2, 7], [5, ABSENT, ABSENT]]


def test_neighbors_that_are_left_out_make_room_for_later_candidates() -> None:
    shown = left_in(MANY, replace(PLAIN, candidates=6, neighbor_dropout=0.3), seeded())
    assert (np.diff(np.where(shown == ABSENT, 99, shown), axis=1) >= 0).all()
    assert (shown[:, 0] == 0).mean() == pytest.approx(0.7, abs=0.03)
    assert (shown != ABSENT).all(1).mean() == pytest.approx(0.930, abs=0.02)  # at least 3 of 6 stay
    assert (left_in(MANY, replace(PLAIN, neighbor_dropout=1.0), seeded()) == ABSENT).all()


def test_the_nearest_are_skipped_by_halving_chances_but_never_all() -> None:
    shown = left_in(MANY, replace(PLAIN, candidates=6, skip_nearest=0.5), seeded())
    first = [(shown[:, 0] == place).mean() for place in range(6)]
    assert first[:3] == pytest.approx([0.5, 0.25, 0.125], abs=0.03)
    lists = np.array([[8, ABSENT, ABSENT, ABSENT]] * 50)
    assert (left_in(lists, replace(PLAIN, skip_nearest=1.0), seeded())[:, 0] == 8).all()


def test_leaders_are_styled_shuffled_or_the_nearest_by_their_chances() -> None:
    settings = replace(PLAIN, style_leader=0.2, shuffle_leader=0.3)
    led = leaders(np.full(4000, 4), np.full(4000, 9), settings, seeded())
    assert (led == 9).mean() == pytest.approx(0.2, abs=0.02)
    assert (led == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert set(led) == {0, 1, 2, 3, 9}
    assert not leaders(np.ones(50, int), np.zeros(50, int), replace(PLAIN, shuffle_leader=1.0), seeded()).any()


def test_the_leader_and_the_first_change_places() -> None:
    assert swapped(np.array([[5, 6, 7], [5, 6, 7]]), np.array([2, 0])).tolist() == [[7, 6, 5], [5, 6, 7]]


def test_the_most_alike_uses_the_same_tokens_wherever_they_lie() -> None:
    tokens = np.array([[1, 1, 2, 3]])
    others = np.array([[[1, 1, 1, 1], [3, 2, 1, 1], [4, 4, 4, 4]]])
    there = np.array([[True, True, True]])
    assert most_alike(tokens, others, there).tolist() == [1]
    assert most_alike(tokens, others, np.array([[True, False, True]])).tolist() == [0]


def test_moved_grids_equal_a_loop_and_are_filled_with_the_token_of_their_corner() -> None:
    grids = torch.randint(0, CODES, (20, 3, SIDE**2), generator=seeded(1))
    made, ways = moved(grids, 2, seeded()), set()
    for before, after in zip(grids.flatten(0, 1).tolist(), made.flatten(0, 1).tolist(), strict=True):
        fits = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                wanted = [
                    before[(row - down) * SIDE + column - right]
                    if 0 <= row - down < SIDE and 0 <= column - right < SIDE
                    else before[0]
                    for row in range(SIDE)
                    for column in range(SIDE)
                ]
                fits += [(down, right)] if wanted == after else []
        assert fits
        ways.update(fits)
    assert len(ways) > 15
    assert torch.equal(moved(grids, 0, seeded()), grids)


def data(settings: ConditioningConfig | None, **changes: object) -> DenoiserData:
    """Eight images, of which the index has ten others' places too; image i's grid holds the token i."""
    record = np.dtype([("embedding", "<f2", (2,)), ("tokens", np.uint16, (SIDE**2,))])
    examples = np.zeros(8, record)
    examples["tokens"] = np.arange(8)[:, None]
    rows = np.array([0, 1, 2, 3, 4, 5, 6, 7, ABSENT, ABSENT])
    lists = np.array([[(item + 1 + n) % 10 for n in range(4)] for item in range(8)])
    table = np.arange(20, dtype=np.float16).reshape(10, 2)
    made = DenoiserData(examples=examples, items=np.arange(8), neighbors=lists, table=table, shown=settings)
    return replace(made, grid_m=2, grid_rows=rows, **changes)  # type: ignore[arg-type]


def test_grids_are_the_tokens_of_the_first_neighbors_that_are_among_the_examples() -> None:
    batch = data(None).batch(torch.arange(8), seeded())
    assert batch["grids"][5, :, 0].tolist() == [6, 7]
    assert batch["grids_present"].tolist() == [[True, True]] * 6 + [[True, False], [False, False]]
    assert batch["neighbors"].shape == (8, 4, 2)


def test_shown_neighbors_and_grids_belong_together_and_depend_on_the_generator_alone() -> None:
    settings = ConditioningConfig(
        k=3, candidates=4, neighbor_dropout=0.3, skip_nearest=0.5, shuffle_leader=0.5, style_leader=0.3
    )
    varied = data(replace(settings, grid_dropout=0.3))
    batch, again = varied.batch(torch.arange(8), seeded(3)), varied.batch(torch.arange(8), seeded(3))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["neighbors"], varied.batch(torch.arange(8), seeded(4))["neighbors"])
    for row in range(8):
        for place in range(2):
            if batch["grids_present"][row, place]:
                assert batch["present"][row, place]
                assert batch["grids"][row, place, 0] == batch["neighbors"][row, place, 0] / 2
    hidden = data(replace(settings, grid_dropout=1.0)).batch(torch.arange(8), seeded())
    assert not hidden["grids_present"].any()
    assert hidden["present"].any()


def test_a_denoiser_is_judged_by_the_nearest_neighbors_as_they_are() -> None:
    settings = ConditioningConfig(k=3, candidates=4, neighbor_dropout=1.0, grid_dropout=1.0, grid_shift=1)
    training, validation = data(settings).split(2)
    assert training.shown == settings
    judged = validation.batch(torch.arange(2), seeded())
    assert judged["neighbors"][0, :, 0].tolist() == [14, 16, 18]
    assert judged["grids_present"].tolist() == [[True, False], [False, False]]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="style_leader must be at most 0.4 with shuffle_leader, got 0.5"):
        ConditioningConfig(shuffle_leader=0.6, style_leader=0.5)
    with pytest.raises(ConfigError, match="candidates must be 0 or at least k, 10, got 9"):
        ConditioningConfig(candidates=9)
    with pytest.raises(ConfigError, match=r"neighbor_dropout must be in \[0, 1\], got 1.5"):
        ConditioningConfig(neighbor_dropout=1.5)
