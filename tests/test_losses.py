"""The closed-form loss, held to dense float64 matrices and, by enumeration, to the likelihood it bounds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_diffusion.diffusion.losses import DiffusionLoss, LossConfig, StepSampler, diffusion_loss, uncertain
from knn_diffusion.diffusion.process import Preset, Schedule, posterior, q_sample
from knn_diffusion.errors import ConfigError

PRESETS = ("released", "mask-and-replace", "absorbing")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_at(
    schedule: Schedule,
    logits: torch.Tensor,
    x_0: torch.Tensor,
    x_n: torch.Tensor,
    step: torch.Tensor,
    **config: Any,
) -> DiffusionLoss:
    """The loss with every step's probability taken as 1; without L_x0 unless said otherwise."""
    made = LossConfig(**{"aux_weight": 0.0, **config})
    asked = uncertain(schedule, x_n)
    logits = logits if asked is None else logits[asked]
    one = torch.ones(len(x_0), dtype=torch.float64)
    return diffusion_loss(schedule, logits, x_0, x_n, step=step, probability=one, config=made)


def dense_loss(schedule: Schedule, p_x_0: np.ndarray, x_0: int, x_n: int, n: int) -> float:
    """L_0 or L_{n-1} of one token by its definition."""
    size = (schedule.num_steps, schedule.vocab_size, schedule.preset)
    if schedule.preset == "absorbing" and x_n < schedule.vocab_size:
        p_x_0 = np.eye(schedule.vocab_size)[x_n]
    forward, prior = reference.product(*size, n, after=n - 1), reference.product(*size, n - 1)
    true = reference.posterior(forward, prior, np.eye(schedule.vocab_size)[x_0], x_n)
    return reference.divergence(true, reference.posterior(forward, prior, p_x_0, x_n))


def possible_pairs(schedule: Schedule, n: int) -> list[tuple[int, int]]:
    """Pairs (x_0, x_n) of positive probability."""
    q = reference.product(schedule.num_steps, schedule.vocab_size, schedule.preset, n)
    return [
        (x_0, x_n) for x_0 in range(schedule.vocab_size) for x_n in range(schedule.vocab_size + 1) if q[x_n, x_0] > 0
    ]


@given(preset=st.sampled_from(PRESETS), seed=st.integers(0, 999), sharpness=st.floats(0, 12), n=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_closed_form_equals_the_dense_definition_for_every_pair_of_tokens(
    preset: Preset, seed: int, sharpness: float, n: int
) -> None:
    schedule = Schedule(num_steps=6, vocab_size=4, preset=preset)
    pairs = possible_pairs(schedule, n)
    x_0, x_n = (torch.tensor(column).unsqueeze(1) for column in zip(*pairs, strict=True))
    logits = sharpness * torch.randn(len(pairs), 1, 4, generator=seeded(seed))
    loss = loss_at(schedule, logits, x_0, x_n, torch.full((len(pairs),), n))
    p = logits.double().softmax(-1)[:, 0].numpy()
    expected = np.array([dense_loss(schedule, p[row], *pair, n) for row, pair in enumerate(pairs)])
    got = (loss.l_0 if n == 1 else loss.l_prev).numpy()
    chance = reference.product(6, 4, preset, n)[x_n[:, 0], x_0[:, 0]]  # a millionth where `released` replaces a token
    assert np.allclose(got * chance, expected * chance, rtol=1e-4, atol=3e-5)
    assert np.allclose(got, expected, rtol=1e-4 if preset != "released" else 0.5, atol=3e-5)
    assert ((loss.l_prev if n == 1 else loss.l_0) == 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_closed_form_equals_the_dense_posterior_at_real_size(preset: Preset) -> None:
    schedule = Schedule(num_steps=100, vocab_size=300, preset=preset)
    x_0 = torch.randint(300, (40, 8), generator=seeded())
    step = torch.randint(2, 101, (40,), generator=seeded(1))
    x_n = q_sample(schedule, x_0, step, seeded(2))
    logits = 3 * torch.randn(40, 8, 300, generator=seeded(3))
    certain = torch.full_like(logits, -torch.inf).scatter(-1, x_0.unsqueeze(-1), 0)
    stride = schedule.stride(step[:, None], step[:, None] - 1)
    true, model = (posterior(schedule, guess, x_n, stride) for guess in (certain, logits))
    expected = torch.where(true > 0, true * (true.log() - model.log()), 0).sum(-1).mean(1)
    got = loss_at(schedule, logits, x_0, x_n, step).l_prev
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("n", [1, 3, 5])
def test_gradient_equals_that_of_the_dense_definition(preset: Preset, n: int) -> None:
    schedule = Schedule(num_steps=6, vocab_size=3, preset=preset)
    pairs = possible_pairs(schedule, n)
    x_0, x_n = (torch.tensor(column).unsqueeze(1) for column in zip(*pairs, strict=True))
    logits = (2 * torch.randn(len(pairs), 1, 3, generator=seeded(n))).requires_grad_()
    loss_at(schedule, logits, x_0, x_n, torch.full((len(pairs),), n)).total.backward()
    assert logits.grad is not None
    base = logits.detach().double()[:, 0]
    for row, code in itertools.product(range(len(pairs)), range(3)):
        values = []
        for sign in (1, -1):
            moved = base[row].clone()
            moved[code] += sign * 1e-5
            values.append(dense_loss(schedule, moved.softmax(-1).numpy(), *pairs[row], n))
        expected = (values[0] - values[1]) / 2e-5
        assert float(logits.grad[row, 0, code]) * len(pairs) == pytest.approx(expected, rel=2e-3, abs=5e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_stay_finite_however_sure_the_prediction(preset: Preset, dtype: torch.dtype) -> None:
    schedule = Schedule(num_steps=100, vocab_size=50, preset=preset)
    x_0 = torch.randint(50, (100, 4), generator=seeded())
    step = torch.arange(1, 101)
    x_n = q_sample(schedule, x_0, step, seeded(1))
    logits = (2000 * torch.randn(100, 4, 50, generator=seeded(2))).to(dtype).requires_grad_()
    loss = loss_at(schedule, logits, x_0, x_n, step, aux_weight=5e-4)
    loss.total.backward()
    assert loss.total.isfinite()
    assert loss.total.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_perfect_prediction_costs_nothing(preset: Preset) -> None:
    schedule = Schedule(num_steps=10, vocab_size=5, preset=preset)
    x_0 = torch.randint(5, (10, 30), generator=seeded())
    step = torch.arange(1, 11)
    x_n = q_sample(schedule, x_0, step, seeded(1))
    logits = torch.nn.functional.one_hot(x_0, 5) * 60.0
    assert loss_at(schedule, logits, x_0, x_n, step, aux_weight=1.0).total == pytest.approx(0, abs=1e-5)


def test_the_first_step_is_the_reconstruction_term_alone() -> None:
    schedule = Schedule(num_steps=10, vocab_size=5)
    x_0 = torch.randint(5, (4, 6), generator=seeded())
    logits = torch.randn(4, 6, 5, generator=seeded(1))
    loss = loss_at(schedule, logits, x_0, torch.full_like(x_0, 5), torch.ones(4, dtype=torch.long), aux_weight=1.0)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x_0)
    assert torch.allclose(loss.total, nll)
    assert torch.allclose(loss.l_0.mean(), nll)


@pytest.mark.parametrize("adaptive", [False, True])
def test_auxiliary_loss_is_weighted_by_xi_and_more_at_early_steps_when_adaptive(adaptive: bool) -> None:
    schedule = Schedule(num_steps=10, vocab_size=5)
    x_0 = torch.randint(5, (2, 6), generator=seeded())
    logits = torch.randn(2, 6, 5, generator=seeded(1))
    step = torch.tensor([2, 10])
    loss = loss_at(schedule, logits, x_0, torch.full_like(x_0, 5), step, aux_weight=0.3, adaptive_aux=adaptive)
    emphasis = torch.tensor([1.9, 1.1]) if adaptive else torch.ones(2)
    assert torch.allclose(loss.total, (loss.l_prev + 0.3 * emphasis * loss.l_x0).mean())
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x_0, reduction="none").mean(1)
    assert torch.allclose(loss.l_x0, nll)


def test_each_image_is_divided_by_the_probability_of_its_step() -> None:
    schedule = Schedule(num_steps=10, vocab_size=5)
    x_0 = torch.randint(5, (2, 6), generator=seeded())
    logits = torch.randn(2, 6, 5, generator=seeded(1))
    step, masked = torch.tensor([4, 9]), torch.full_like(x_0, 5)
    probability = torch.tensor([0.2, 0.05], dtype=torch.float64)
    loss = diffusion_loss(
        schedule, logits, x_0, masked, step=step, probability=probability, config=LossConfig(aux_weight=0.0)
    )
    assert torch.allclose(loss.total, (loss.l_prev[0] / 0.2 + loss.l_prev[1] / 0.05) / 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_bound_is_never_below_the_exact_negative_log_likelihood(preset: Preset) -> None:
    """Two tokens, three codes, four steps: every noised pair, and the chain's exact distribution over images."""
    num_steps, vocab_size = 4, 3
    schedule = Schedule(num_steps=num_steps, vocab_size=vocab_size, preset=preset)
    states = torch.tensor(reference.sequences(vocab_size + 1, 2))  # 16 pairs
    images = torch.tensor(reference.sequences(vocab_size, 2))  # 9 pairs
    logits = {n: 2 * torch.randn(len(states), 2, vocab_size, generator=seeded(n)) for n in range(1, num_steps + 1)}
    mask = 0.9 if preset == "mask-and-replace" else 0.99999 if preset == "released" else 1.0
    prior = np.array([(1 - mask) / vocab_size] * vocab_size + [mask])

    chance = prior[states].prod(1)
    for n in range(num_steps, 0, -1):
        stride = schedule.stride(torch.tensor([n]), torch.tensor([n - 1]))
        rows = posterior(schedule, logits[n], states, stride).nan_to_num(0).numpy()
        move = rows[:, 0][:, states[:, 0]] * rows[:, 1][:, states[:, 1]]
        chance = chance @ move
    is_image = (states < vocab_size).all(1).numpy()
    nll = -np.log(chance[is_image])
    assert chance.sum() == pytest.approx(1, abs=1e-9)

    for image, exact in zip(images, nll, strict=True):
        last = reference.product(num_steps, vocab_size, preset, num_steps)
        bound = sum(reference.divergence(last[:, token], prior) for token in image.tolist())
        for n in range(1, num_steps + 1):
            q = reference.product(num_steps, vocab_size, preset, n)
            weight = torch.from_numpy(q[states[:, 0], image[0]] * q[states[:, 1], image[1]])
            loss = loss_at(schedule, logits[n], image.expand(len(states), 2), states, torch.full((len(states),), n))
            per_image = torch.where(weight > 0, loss.bound.double(), 0)
            bound += 2 * float((weight * per_image).sum())  # the loss is a mean over the two tokens
        assert bound >= exact - 1e-4


@pytest.mark.parametrize("preset", ["mask-and-replace", "absorbing"])
def test_the_bound_of_an_exact_denoiser_is_the_entropy_of_the_data(preset: Preset) -> None:
    schedule = Schedule(num_steps=5, vocab_size=3, preset=preset)
    data = np.array([0.6, 0.3, 0.1])
    bound = 0.0
    for n in range(1, 6):
        joint = reference.product(5, 3, preset, n)[:, :3] * data  # x_n, x_0
        possible = [(x_n, x_0) for x_n in range(4) for x_0 in range(3) if joint[x_n, x_0] > 0]
        x_n, x_0 = (torch.tensor(column).unsqueeze(1) for column in zip(*possible, strict=True))
        exact = torch.from_numpy(joint / joint.sum(1, keepdims=True).clip(1e-12)).log()[x_n[:, 0]].unsqueeze(1)
        loss = loss_at(schedule, exact.float().clamp_min(-90), x_0, x_n, torch.full((len(possible),), n))
        bound += float((torch.tensor([joint[pair] for pair in possible]) * loss.bound).sum())
    assert bound == pytest.approx(float(-(data * np.log(data)).sum()), abs=1e-5)


def test_loss_weights_below_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"aux_weight must be at least 0, got -1.0"):
        LossConfig(aux_weight=-1.0)


def test_uniform_steps_cover_1_to_n_evenly() -> None:
    step, probability = StepSampler(5).sample(20_000, seeded())
    shares = torch.bincount(step, minlength=6) / 20_000
    assert shares[0] == 0
    assert torch.allclose(shares[1:], torch.full((5,), 0.2), atol=0.02)
    assert (probability == 0.2).all()


def warm(kind: str = "importance") -> StepSampler:
    """A sampler that has seen a loss of n at every step n, more than ten times."""
    sampler = StepSampler(4, kind)  # type: ignore[arg-type]
    for _ in range(200):
        sampler.update(torch.arange(1, 5), torch.arange(1.0, 5.0))
    return sampler


def test_importance_sampling_is_uniform_until_every_step_was_seen_more_than_ten_times() -> None:
    sampler = StepSampler(4, "importance")
    for _ in range(10):
        sampler.update(torch.arange(1, 5), torch.arange(1.0, 5.0))
    assert (sampler.probabilities() == 0.25).all()
    sampler.update(torch.arange(1, 5), torch.arange(1.0, 5.0))
    assert not (sampler.probabilities() == 0.25).all()


def test_importance_follows_the_root_mean_square_and_treats_the_first_step_as_the_second() -> None:
    expected = torch.tensor([2, 2, 3, 4], dtype=torch.float64) + 1e-4
    assert torch.allclose(warm().probabilities(), expected / expected.sum(), atol=1e-6)


def test_importance_weights_leave_the_expected_loss_unchanged() -> None:
    step, probability = warm().sample(40_000, seeded())
    loss = torch.tensor([0.0, 5, 1, 7, 2])
    assert (loss[step] / probability).mean() == pytest.approx(15, rel=0.02)


def test_losses_of_one_step_in_one_batch_count_by_their_mean() -> None:
    sampler = StepSampler(3, "importance")
    sampler.update(torch.tensor([2, 2, 3]), torch.tensor([1.0, 3.0, 2.0]))
    assert torch.allclose(sampler.mean_square, torch.tensor([0, (1 - 0.81) * 5, 0.1 * 4]))
    assert sampler.draws.tolist() == [0, 2, 1]


def test_the_memory_of_importance_sampling_is_checkpointed() -> None:
    sampler, fresh = warm(), StepSampler(4, "importance")
    fresh.load_state_dict(sampler.state_dict())
    assert torch.equal(fresh.probabilities(), sampler.probabilities())
    assert torch.equal(fresh.sample(50, seeded())[0], sampler.sample(50, seeded())[0])


def test_a_uniform_sampler_ignores_what_it_sees() -> None:
    assert (warm("uniform").probabilities() == 0.25).all()
