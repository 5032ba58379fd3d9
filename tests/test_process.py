"""The forward process and its posterior, held to dense matrices, to Bayes' rule and to diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_diffusion.config import from_dict
from knn_diffusion.diffusion import process
from knn_diffusion.diffusion.process import Schedule, categorical, posterior, prior_sample, q_sample, uniform
from knn_diffusion.errors import ConfigError, UsageError

PRESETS = ("released", "mask-and-replace", "absorbing")
presets = st.sampled_from(PRESETS)
small = {"num_steps": st.integers(2, 7), "vocab_size": st.integers(2, 5)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(rates: process.Rates, vocab_size: int) -> np.ndarray:
    """The matrix that three numbers stand for."""
    q = np.full((vocab_size + 1, vocab_size + 1), float(rates.beta)) + float(rates.alpha) * np.eye(vocab_size + 1)
    q[vocab_size], q[:, vocab_size] = float(rates.gamma), 0
    q[vocab_size, vocab_size] = 1
    return q


def one_hot_logits(x_0: torch.Tensor, vocab_size: int) -> torch.Tensor:
    certain = torch.full((*x_0.shape, vocab_size), -torch.inf, dtype=torch.float64)
    return certain.scatter(-1, x_0.unsqueeze(-1), 0)


def all_pairs(schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of a visible or masked x_n with an x_0, as one image."""
    x_n, x_0 = torch.meshgrid(torch.arange(schedule.vocab_size + 1), torch.arange(schedule.vocab_size), indexing="ij")
    return x_n.reshape(1, -1), x_0.reshape(1, -1)


@pytest.mark.parametrize("preset", PRESETS)
def test_tables_are_float64_with_an_identity_at_step_zero(preset: process.Preset) -> None:
    schedule = Schedule(num_steps=7, vocab_size=5, preset=preset)
    for table, first in (
        (schedule.alpha_bar, 1), (schedule.beta_bar, 0), (schedule.gamma_bar, 0),
        (schedule.alpha, 1), (schedule.beta, 0), (schedule.gamma, 0),
    ):  # fmt: skip
        assert table.dtype == torch.float64
        assert table.shape == (8,)
        assert table[0] == first


@given(preset=presets, **small)
@settings(max_examples=20, deadline=None)
def test_columns_of_every_matrix_sum_to_one_and_hold_no_negative_chance(
    preset: process.Preset, num_steps: int, vocab_size: int
) -> None:
    schedule = Schedule(num_steps=num_steps, vocab_size=vocab_size, preset=preset)
    for n in range(num_steps + 1):
        rates = process.Rates(alpha=schedule.alpha[n], beta=schedule.beta[n], gamma=schedule.gamma[n])
        for q in (dense(rates, vocab_size), dense(schedule.marginal(torch.tensor(n)), vocab_size)):
            assert np.allclose(q.sum(0), 1, atol=1e-14)
            assert (q >= 0).all()


@given(preset=presets, **small)
@settings(max_examples=20, deadline=None)
def test_closed_form_equals_the_product_of_single_steps(
    preset: process.Preset, num_steps: int, vocab_size: int
) -> None:
    schedule = Schedule(num_steps=num_steps, vocab_size=vocab_size, preset=preset)
    for n in range(1, num_steps + 1):
        for s in range(n):
            expected = reference.product(num_steps, vocab_size, preset, n, after=s)
            between = schedule.transition(torch.tensor(s), torch.tensor(n))
            assert np.allclose(dense(between, vocab_size), expected, atol=1e-12)
        expected = reference.product(num_steps, vocab_size, preset, n)
        assert np.allclose(dense(schedule.marginal(torch.tensor(n)), vocab_size), expected, atol=1e-12)


def test_released_schedule_replaces_a_millionth_and_reveals_about_ten_of_1024_tokens_a_step() -> None:
    schedule = Schedule(num_steps=100, vocab_size=2887, preset="released")
    assert np.allclose(schedule.alpha_bar[1:] + schedule.gamma_bar[1:], 0.999999, atol=1e-15)
    assert float(schedule.alpha_bar[1]) == 0.99999
    assert np.isclose(float(schedule.gamma_bar[100]), 0.99999)
    assert np.isclose(float(schedule.gamma_bar[50] - schedule.gamma_bar[49]) * 1024, 10.34, atol=0.01)
    assert torch.allclose(2887 * schedule.beta_bar[1:], torch.tensor(1e-6, dtype=torch.float64), atol=1e-12)


def test_mask_and_replace_ends_at_nine_tenths_masked_and_one_tenth_uniform() -> None:
    schedule = Schedule(num_steps=10, vocab_size=4, preset="mask-and-replace")
    assert float(schedule.gamma_bar[-1]) == 0.9
    assert np.isclose(4 * float(schedule.beta_bar[-1]), 0.1)
    assert float(schedule.alpha_bar[-1]) == 0
    x_n = prior_sample(schedule, 1, 40_000, seeded())
    shares = torch.bincount(x_n[0], minlength=5) / 40_000
    assert torch.allclose(shares, torch.tensor([0.025, 0.025, 0.025, 0.025, 0.9]), atol=0.006)


@pytest.mark.parametrize("preset", ["released", "absorbing"])
def test_the_other_chains_start_all_masked(preset: process.Preset) -> None:
    schedule = Schedule(num_steps=10, vocab_size=4, preset=preset)
    assert (prior_sample(schedule, 2, 9, seeded()) == schedule.mask_id).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_noised_tokens_follow_the_columns_of_the_matrix_product(preset: process.Preset) -> None:
    schedule = Schedule(num_steps=6, vocab_size=4, preset=preset)
    for n in (0, 2, 4, 6):
        x_n = q_sample(schedule, torch.full((1, 40_000), 2), torch.tensor([n]), seeded(n))
        shares = torch.bincount(x_n[0], minlength=5).numpy() / 40_000
        assert np.allclose(shares, reference.product(6, 4, preset, n)[:, 2], atol=0.012)


def test_noising_takes_each_image_to_its_own_step() -> None:
    schedule = Schedule(num_steps=10, vocab_size=4, preset="absorbing")
    x_n = q_sample(schedule, torch.ones(3, 1000, dtype=torch.long), torch.tensor([0, 5, 10]), seeded())
    masked = (x_n == 4).float().mean(1)
    assert masked[0] == 0
    assert masked[1] == pytest.approx(0.5, abs=0.06)
    assert masked[2] == 1


@given(preset=presets, seed=st.integers(0, 999), sharpness=st.floats(0, 8), data=st.data(), **small)
@settings(max_examples=40, deadline=None)
def test_posterior_equals_bayes_rule_for_any_stride(
    *, preset: process.Preset, seed: int, sharpness: float, data: st.DataObject, num_steps: int, vocab_size: int
) -> None:
    n = data.draw(st.integers(1, num_steps))
    s = data.draw(st.integers(0, n - 1))
    schedule = Schedule(num_steps=num_steps, vocab_size=vocab_size, preset=preset)
    logits = sharpness * torch.randn(1, vocab_size + 1, vocab_size, generator=seeded(seed), dtype=torch.float64)
    x_n = torch.arange(vocab_size + 1).unsqueeze(0)
    got = posterior(schedule, logits, x_n, schedule.stride(torch.tensor([n]), torch.tensor([s])))[0].numpy()
    forward = reference.product(num_steps, vocab_size, preset, n, after=s)
    prior = reference.product(num_steps, vocab_size, preset, s)
    for token in range(vocab_size + 1):
        p_x_0 = logits[0, token].softmax(-1).numpy()
        if preset == "absorbing" and token < vocab_size:
            if n == num_steps:
                continue  # a visible token cannot occur where all are masked
            p_x_0 = np.eye(vocab_size)[token]  # the only x_0 that can have led here
        assert np.allclose(got[token], reference.posterior(forward, prior, p_x_0, token), atol=1e-12)
        assert np.isclose(got[token].sum(), 1, atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_posterior_averaged_over_the_noised_token_is_the_forward_marginal(preset: process.Preset) -> None:
    schedule = Schedule(num_steps=6, vocab_size=3, preset=preset)
    x_n, x_0 = all_pairs(schedule)
    for n in range(1, 7):
        for s in range(n):
            q = posterior(schedule, one_hot_logits(x_0, 3), x_n, schedule.stride(torch.tensor([n]), torch.tensor([s])))[
                0
            ]
            weight = torch.tensor(reference.product(6, 3, preset, n))[x_n[0], x_0[0]]
            q = torch.where(weight.unsqueeze(1) > 0, q, 0)
            for token in range(3):
                mixed = (q * weight.unsqueeze(1))[x_0[0] == token].sum(0).numpy()
                assert np.allclose(mixed, reference.product(6, 3, preset, s)[:, token], atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_strided_posterior_equals_single_steps_composed(preset: process.Preset) -> None:
    schedule = Schedule(num_steps=6, vocab_size=3, preset=preset)
    states = torch.arange(4).unsqueeze(0)
    for token in range(3):
        logits = one_hot_logits(torch.full((1, 4), token), 3)

        def step_matrix(n: int, s: int, logits: torch.Tensor = logits) -> torch.Tensor:
            return posterior(schedule, logits, states, schedule.stride(torch.tensor([n]), torch.tensor([s])))[
                0
            ].nan_to_num(0)

        composed = torch.eye(4, dtype=torch.float64)
        for n in range(5, 1, -1):
            composed = composed @ step_matrix(n, n - 1)
        reachable = torch.tensor(reference.product(6, 3, preset, 5)[:, token] > 0)
        assert torch.allclose(composed[reachable], step_matrix(5, 1)[reachable], atol=1e-12)


@given(preset=presets, seed=st.integers(0, 99), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_masked_token_stays_masked_by_the_schedule_whatever_is_predicted(
    preset: process.Preset, seed: int, data: st.DataObject
) -> None:
    schedule = Schedule(num_steps=20, vocab_size=6, preset=preset)
    n = data.draw(st.integers(1, 20))
    s = data.draw(st.integers(0, n - 1))
    logits = 9 * torch.randn(1, 5, 6, generator=seeded(seed))
    stays = posterior(schedule, logits, torch.full((1, 5), 6), schedule.stride(torch.tensor([n]), torch.tensor([s])))[
        ..., -1
    ]
    assert torch.allclose(stays, schedule.gamma_bar[s] / schedule.gamma_bar[n], atol=1e-14)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_unmasked_token_is_never_masked_again(preset: process.Preset) -> None:
    schedule = Schedule(num_steps=9, vocab_size=5, preset=preset)
    logits = 3 * torch.randn(1, 5, 5, generator=seeded())
    for n in range(1, 9):
        chances = posterior(
            schedule, logits, torch.arange(5)[None], schedule.stride(torch.tensor([n]), torch.tensor([n - 1]))
        )
        assert (chances[..., -1] == 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_at_the_first_step_the_posterior_is_certain_of_x_0(preset: process.Preset) -> None:
    schedule = Schedule(num_steps=9, vocab_size=3, preset=preset)
    x_n, x_0 = all_pairs(schedule)
    if preset == "absorbing":  # there a visible token other than x_0 cannot occur
        possible = (x_n == 3) | (x_n == x_0)
        x_n, x_0 = x_n[possible][None], x_0[possible][None]
    got = posterior(schedule, one_hot_logits(x_0, 3), x_n, schedule.stride(torch.tensor([1]), torch.tensor([0])))
    assert torch.allclose(got, torch.nn.functional.one_hot(x_0, 4).double(), atol=1e-14)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_reverse_chain_ends_in_a_distribution_without_mask(preset: process.Preset) -> None:
    schedule = Schedule(num_steps=8, vocab_size=3, preset=preset)
    states = torch.arange(4).unsqueeze(0)
    chance = torch.tensor([0, 0, 0, 1], dtype=torch.float64)
    if preset == "mask-and-replace":
        chance = torch.tensor([0.1 / 3] * 3 + [0.9], dtype=torch.float64)
    for n in range(8, 0, -1):
        logits = 2 * torch.randn(1, 4, 3, generator=seeded(n))
        move = posterior(schedule, logits, states, schedule.stride(torch.tensor([n]), torch.tensor([n - 1])))[0]
        chance = torch.where(chance.unsqueeze(1) > 0, chance.unsqueeze(1) * move, 0).sum(0)
    assert chance[-1] == 0
    assert chance.sum() == pytest.approx(1, abs=1e-14)


def test_posterior_and_tables_agree_with_diffusers() -> None:
    from diffusers.schedulers import VQDiffusionScheduler

    vocab_size, seq = 6, 40
    oracle = VQDiffusionScheduler(num_vec_classes=vocab_size + 1, num_train_timesteps=100)
    schedule = Schedule(num_steps=100, vocab_size=vocab_size, preset="released")
    assert torch.allclose(oracle.log_cumprod_ct[:100].exp(), schedule.gamma_bar[1:].float(), atol=1e-6)
    assert torch.allclose(oracle.log_at.exp(), schedule.alpha[1:].float(), atol=1e-6)
    generator = seeded(3)
    logits = 2 * torch.randn(1, seq, vocab_size, generator=generator)
    x_n = torch.randint(vocab_size + 1, (1, seq), generator=generator)
    for n in (2, 30, 77, 100):
        log_p = logits.double().log_softmax(-1).float().transpose(1, 2)
        expected = oracle.q_posterior(log_p, x_n, torch.tensor(n - 1)).transpose(1, 2)
        got = posterior(schedule, logits, x_n, schedule.stride(torch.tensor([n]), torch.tensor([n - 1])))
        assert torch.allclose(got.float(), expected.exp(), atol=2e-4)


def test_each_class_is_drawn_as_often_as_its_probability() -> None:
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    drawn = categorical(probs.double().expand(1, 50_000, -1), seeded())
    shares = torch.bincount(drawn[0], minlength=5) / 50_000
    assert torch.allclose(shares, probs, atol=0.01)
    assert shares[1] == 0


def test_a_class_of_one_in_a_trillion_keeps_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each target lies just inside or just outside a rare class; float32 noise would merge them."""
    rare = 1e-12
    expected = {
        0.5 * rare: 0,
        1.5 * rare: 1,
        0.5 + 1.5 * rare: 2,
        0.5 + 2.5 * rare: 3,
        1 + 1.5 * rare: 3,
        1 + 2.5 * rare: 4,
    }
    targets = torch.tensor([list(expected)], dtype=torch.float64) / (1 + 3 * rare)
    monkeypatch.setattr(process, "uniform", lambda *_: targets)
    chances = torch.tensor([rare, 0.5, rare, 0.5, rare], dtype=torch.float64).expand(1, 6, -1)
    assert categorical(chances, seeded())[0].tolist() == list(expected.values())


def test_uniform_numbers_are_finer_than_float32() -> None:
    drawn = uniform(seeded(), 1, 4096)
    assert drawn.dtype == torch.float64
    assert (drawn * 2**32 % 1 != 0).float().mean() > 0.99
    assert drawn.min() >= 0
    assert drawn.max() < 1


@pytest.mark.parametrize(("target", "drawn"), [(0.0, 2), (1 - 2**-53, 25)])
def test_the_extreme_draws_never_take_an_impossible_class(
    monkeypatch: pytest.MonkeyPatch, target: float, drawn: int
) -> None:
    monkeypatch.setattr(process, "uniform", lambda *_: torch.full((1, 500), target, dtype=torch.float64))
    chances = torch.randn(1, 500, 30, generator=seeded()).double().exp()
    chances[..., :2] = chances[..., -4:] = 0
    assert (categorical(chances, seeded()) == drawn).all()


def test_one_generator_per_image_makes_an_image_independent_of_its_batch() -> None:
    chances = torch.rand(3, 20, 7, generator=seeded()).double()
    together = categorical(chances, [seeded(0), seeded(1), seeded(2)])
    alone = torch.cat([categorical(chances[i : i + 1], [seeded(i)]) for i in range(3)])
    assert torch.equal(together, alone)


def test_a_wrong_number_of_generators_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected a generator for each of 3 images, got 1: pass one per image"):
        uniform([seeded()], 3, 5)


def test_steps_out_of_order_or_outside_the_tables_are_refused() -> None:
    schedule = Schedule(num_steps=5, vocab_size=3)
    logits, x_n = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(UsageError, match=r"expected prev_step below step, got \[3\] and \[3\]"):
        posterior(schedule, logits, x_n, schedule.stride(torch.tensor([3]), torch.tensor([3])))
    with pytest.raises(UsageError, match=r"expected steps from 0 to 5, got \[-1\]"):
        posterior(schedule, logits, x_n, schedule.stride(torch.tensor([1]), torch.tensor([-1])))
    with pytest.raises(UsageError, match=r"expected steps from 1 to 5, got \[0\]"):
        posterior(schedule, logits, x_n, schedule.stride(torch.tensor([0]), torch.tensor([-1])))
    with pytest.raises(UsageError, match=r"expected steps from 0 to 5, got \[6\]"):
        q_sample(schedule, x_n, torch.tensor([6]), seeded())


def test_impossible_schedules_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"num_steps must be at least 2, got 1"):
        Schedule(num_steps=1, vocab_size=3)
    with pytest.raises(ConfigError, match=r"schedule: preset: input should be 'released', .* got 'cosine'"):
        from_dict(Schedule, {"num_steps": 5, "vocab_size": 3, "preset": "cosine"}, "schedule")


def test_tables_made_while_sampling_still_serve_training() -> None:
    schedule = Schedule(num_steps=13, vocab_size=17)
    with torch.inference_mode():
        _ = schedule.alpha, schedule.alpha_bar
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (scale * schedule.alpha_bar.sum() + (scale * schedule.alpha).sum()).backward()
    assert scale.grad is not None
