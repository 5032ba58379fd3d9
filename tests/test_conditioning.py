"""What goes into y, what the null condition is, and what training does to y."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from knn_diffusion.diffusion.conditioning import (
    agreeing,
    drop_condition,
    drop_query,
    lafite_noise,
    lead_with,
    led_in_turn,
    make_condition,
    null_condition,
    replace_first_neighbor,
    with_null,
)
from knn_diffusion.errors import ConfigError, UsageError
from knn_diffusion.shapes import Condition


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(batch: int = 2, k: int = 3, dim: int = 8) -> Condition:
    query, neighbors = torch.randn(batch, dim, generator=seeded(1)), torch.randn(batch, k, dim, generator=seeded(2))
    return make_condition(query, neighbors)


def test_the_query_stands_first_and_the_neighbors_keep_their_order() -> None:
    query, neighbors = torch.randn(2, 8, generator=seeded()), torch.randn(2, 3, 8, generator=seeded(1))
    condition = make_condition(query, neighbors)
    assert torch.equal(condition.y[:, 0], query)
    assert torch.equal(condition.y[:, 1:], neighbors)
    assert condition.present.all()


def test_absent_neighbors_are_masked_out_and_nothing_of_them_remains() -> None:
    neighbors = torch.full((1, 2, 4), torch.nan)
    neighbors[0, 0] = 1
    condition = make_condition(torch.ones(1, 4), neighbors, torch.tensor([[True, False]]))
    assert condition.present.tolist() == [[True, True, False]]
    assert condition.y[0, 2].tolist() == [0, 0, 0, 0]


def test_a_condition_may_have_no_neighbors() -> None:
    assert make_condition(torch.ones(2, 4), torch.ones(2, 0, 4)).y.shape == (2, 1, 4)


def test_the_null_condition_is_all_zeros_and_all_present() -> None:
    condition = make_condition(torch.ones(1, 4), torch.ones(1, 2, 4), torch.tensor([[True, False]]))
    null = null_condition(condition)
    assert null.y.shape == condition.y.shape
    assert not null.y.any()
    assert null.present.all()


def test_the_null_condition_silences_attention_exactly_only_without_biases() -> None:
    null, x = null_condition(example()).y, torch.randn(2, 5, 8, generator=seeded())
    for bias, silent in ((False, True), (True, False)):
        attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
        for parameter in attention.parameters():
            nn.init.normal_(parameter, generator=seeded(3))
        assert (not attention(x, null, null)[0].any()) is silent


def test_both_halves_are_the_conditional_rows_then_the_null_rows() -> None:
    condition = example()
    both = with_null(condition)
    assert torch.equal(both.y[:2], condition.y)
    assert torch.equal(both.y[2:], null_condition(condition).y)
    assert both.present.shape == (4, 4)


def test_editing_replaces_the_first_neighbor_and_nothing_else() -> None:
    condition = make_condition(torch.ones(1, 4), torch.ones(1, 2, 4), torch.tensor([[False, True]]))
    edited = replace_first_neighbor(condition, torch.full((1, 4), 7.0))
    assert edited.y[0, 1].tolist() == [7, 7, 7, 7]
    assert edited.present.all()
    assert torch.equal(edited.y[:, [0, 2]], condition.y[:, [0, 2]])
    assert condition.present.tolist() == [[True, False, True]]


def with_grids(batch: int = 2, m: int = 2) -> Condition:
    grids = torch.arange(batch * m * 4).reshape(batch, m, 4)
    return make_condition(torch.ones(batch, 8), torch.randn(batch, 3, 8, generator=seeded()), grids=grids)


def test_grids_are_all_present_unless_said_otherwise_and_the_null_condition_has_none() -> None:
    condition = with_grids()
    assert condition.grids_present.tolist() == [[True, True]] * 2
    assert not null_condition(condition).grids_present.any()
    assert with_null(condition).grids_present.tolist() == [[True, True]] * 2 + [[False, False]] * 2
    own_null = with_null(condition, torch.ones(4, 8))
    assert own_null.grids_present.tolist() == with_null(condition).grids_present.tolist()
    assert torch.equal(own_null.grids[:2], condition.grids)


def test_dropping_a_condition_drops_its_grids_and_hiding_the_query_keeps_them() -> None:
    condition = with_grids(batch=50)
    dropped = drop_condition(condition, 0.5, seeded())
    assert torch.equal(dropped.grids_present.all(1), dropped.y.any(2).any(1))
    assert torch.equal(dropped.grids_present.any(1), dropped.grids_present.all(1))
    assert drop_query(condition, 1.0, seeded()).grids_present.all()


def test_a_reference_leads_with_its_own_tokens() -> None:
    condition = with_grids(batch=1)
    absent = replace(condition, grids_present=torch.tensor([[False, True]]))
    edited = replace_first_neighbor(absent, torch.zeros(1, 8), torch.tensor([[9, 8, 7, 6]]))
    assert edited.grids.tolist() == [[[9, 8, 7, 6], [4, 5, 6, 7]]]
    assert edited.grids_present.all()
    assert not absent.grids_present.all()


def test_another_neighbor_leads_in_y_and_among_the_grids() -> None:
    condition = with_grids(batch=1)
    led = lead_with(condition, 1)
    assert torch.equal(led.y, condition.y[:, [0, 2, 1, 3]])
    assert torch.equal(led.grids, condition.grids[:, [1, 0]])
    assert torch.equal(lead_with(condition, 0).y, condition.y)


def test_neighbors_with_grids_lead_in_turn() -> None:
    condition = with_grids(batch=1, m=3)
    partly = replace(condition, grids_present=torch.tensor([[True, False, True]]))
    for number, leader in enumerate([0, 2, 0, 2]):
        assert torch.equal(led_in_turn(partly, number).grids, lead_with(partly, leader).grids)
    nobody = replace(condition, grids_present=torch.zeros(1, 3, dtype=torch.bool))
    assert led_in_turn(nobody, 1) is nobody
    assert led_in_turn(example(), 1).grids is None


def test_neighbors_agree_by_the_cosine_of_the_coordinates_that_are_compared() -> None:
    neighbors = torch.tensor([[[1.0, 0.0, 9.0], [1.0, 1.0, -9.0], [0.0, 1.0, 9.0], [1.0, 0.0, 9.0]]])
    present = torch.tensor([[True, True, True, False]])
    assert agreeing(neighbors, present, 0.7, 2).tolist() == [[True, True, False, False]]
    assert agreeing(neighbors, present, 0.72, 2).tolist() == [[True, False, False, False]]
    assert agreeing(neighbors, present, 0.9, 0).tolist() == [[True, False, True, False]]


def test_rows_of_a_condition_can_be_picked_repeated_and_joined() -> None:
    condition = with_grids(batch=3)
    picked = condition.select([2, 0])
    assert torch.equal(picked.y, condition.y[[2, 0]])
    assert torch.equal(picked.grids, condition.grids[[2, 0]])
    assert torch.equal(condition.select(slice(1, 2)).expand(2).grids, condition.grids[[1, 1]])
    joined = Condition.cat([condition, picked])
    assert torch.equal(joined.grids_present, torch.ones(5, 2, dtype=torch.bool))
    assert Condition.cat([example(), example()]).grids is None


def test_editing_without_neighbors_is_refused() -> None:
    with pytest.raises(
        UsageError, match="expected a neighbor to replace, got a condition without any: ask for k of at"
    ):
        replace_first_neighbor(example(k=0), torch.ones(2, 8))


def test_lafite_noise_keeps_unit_length_and_leaves_a_cosine_of_about_a_third() -> None:
    embedding = nn.functional.normalize(torch.randn(500, 256, generator=seeded()), dim=-1)
    noised = lafite_noise(embedding, 0.75, seeded(1))
    assert torch.allclose(noised.norm(dim=-1), torch.ones(500))
    assert (noised * embedding).sum(-1).mean() == pytest.approx(0.316, abs=0.01)
    assert torch.allclose(lafite_noise(embedding, 0.0, seeded(1)), embedding)


def test_dropping_gives_whole_images_the_null_condition() -> None:
    condition = make_condition(torch.ones(1000, 4), torch.ones(1000, 2, 4), torch.zeros(1000, 2, dtype=torch.bool))
    dropped = drop_condition(condition, 0.2, seeded())
    is_null = ~dropped.y.any(dim=(1, 2))
    assert is_null.float().mean() == pytest.approx(0.2, abs=0.04)
    assert dropped.present[is_null].all()
    assert torch.equal(dropped.y[~is_null], condition.y[~is_null])
    assert torch.equal(dropped.present[~is_null], condition.present[~is_null])


def test_dropping_never_and_always_are_exact() -> None:
    condition = example()
    assert torch.equal(drop_condition(condition, 0.0, seeded()).y, condition.y)
    assert not drop_condition(condition, 1.0, seeded()).y.any()


def test_hiding_the_query_leaves_the_neighbors() -> None:
    condition = example()
    hidden = drop_query(condition, 1.0, seeded())
    assert not hidden.present[:, 0].any()
    assert not hidden.y[:, 0].any()
    assert torch.equal(hidden.y[:, 1:], condition.y[:, 1:])
    assert condition.present.all()
    assert condition.y[:, 0].any()


def test_hiding_the_query_of_an_image_without_neighbors_gives_the_null_condition() -> None:
    condition = make_condition(torch.ones(1, 4), torch.ones(1, 2, 4), torch.tensor([[False, False]]))
    hidden = drop_query(condition, 1.0, seeded())
    assert hidden.present.all()
    assert not hidden.y.any()


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_a_probability_outside_0_and_1_is_refused(probability: float) -> None:
    with pytest.raises(ConfigError, match="probability must be between 0 and 1, got"):
        drop_condition(example(), probability, seeded())
